"""The gated activation of a network that every token passes, its two branches side by side, and its gradient."""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.kernels.experts.kernel import gate_pairs, gate_pairs_backward

TILE = 2048
"""Numbers a program handles."""


def swiglu(both: Tensor, limit: float) -> Tensor:
    """Clamp and gate, silu(min(gate, limit)) * clamp(up, -limit, limit), of gate and up beside each other [T, 2 F]: [T, F]."""
    return _Swiglu.apply(both, limit)


def _launch(count: int, width: int) -> tuple[tuple[int, int], dict[str, int]]:
    """Cut rows at the largest power of two that divides the width, so that no tile is partly empty, unless that is very small."""
    divisor = width & -width
    block = min(TILE, divisor if divisor >= 64 else triton.next_power_of_2(width))
    rows = TILE // block
    return (triton.cdiv(count, rows), triton.cdiv(width, block)), {"ROWS": rows, "BLOCK": block, "num_warps": 4}


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, both: Tensor, limit: float) -> Tensor:
        both = both.contiguous()
        count, width = len(both), both.shape[1] // 2
        out = both.new_empty(count, width)
        grid, tile = _launch(count, width)
        if count:
            gate_pairs[grid](both, out, count, width, limit, **tile)
        ctx.save_for_backward(both)
        ctx.limit = limit
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (both,) = ctx.saved_tensors
        dboth = torch.empty_like(both)
        count, width = grad.shape
        grid, tile = _launch(count, width)
        if count:
            gate_pairs_backward[grid](grad.contiguous(), both, dboth, count, width, ctx.limit, **tile)
        return dboth, None
