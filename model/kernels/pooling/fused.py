"""Launches of the compressor's pooling and its gradient."""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.kernels.pooling import kernel
from model.layout import Entries

TOKENS = 32
"""Tokens of an entry that a program takes at a time, at most."""
BLOCK = 128
"""Channels a program, at most."""
PROGRAMS = 1056
"""Programs of the backward pass, about: eight for each processor of an H200."""


def pool(kv: Tensor, gate: Tensor, ape: Tensor, entries: Entries, *, overlaps: bool, shared: bool) -> Tensor:
    """Take the softmax-weighted mean of each entry's tokens, sum_j softmax_j(gate_j + ape_j) kv_j in every channel.

    Args:
        kv: [U, c * K] projections of the computed tokens, rows may lie apart; c = 2 if `overlaps`, else 1.
        gate: [U, c * K] in the same way.
        ape: [m, c * K] added to the gate by the token's place in its block.
        entries: the row's entries.
        overlaps: an entry also weighs the m tokens before its own, by their first K channels; its own count by their last K.
        shared: several entries may have the same computed tokens.

    Returns:
        [C, K] fp32; computed in fp32.

    Source: v4_spec 2.2.
    """
    return _Pool.apply(kv, gate, ape, entries, overlaps, shared)


def _tile(ratio: int, width: int, overlaps: bool) -> dict[str, int | bool]:
    tokens = min(TOKENS, triton.next_power_of_2(2 * ratio if overlaps else ratio))
    block = min(BLOCK, triton.next_power_of_2(width))
    return {"RATIO": ratio, "OVERLAP": overlaps, "TOKENS": tokens, "BLOCK": block, "num_warps": 4 if tokens * block > 1024 else 2}


def _adjacent(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kv: Tensor, gate: Tensor, ape: Tensor, entries: Entries, overlaps: bool, shared: bool) -> Tensor:
        kv, gate, ape = _adjacent(kv), _adjacent(gate), ape.contiguous()
        count, channels = len(entries.first), kv.shape[1]
        width = channels // (2 if overlaps else 1)
        out = torch.empty(count, width, dtype=torch.float32, device=kv.device)
        lse = torch.empty_like(out)
        tile = _tile(entries.ratio, width, overlaps)
        if count:
            kernel.pool[(count, triton.cdiv(width, tile["BLOCK"]))](
                kv, gate, ape, entries.computed, entries.first, out, lse, width, kv.stride(0), gate.stride(0), channels, **tile
            )
        ctx.save_for_backward(kv, gate, ape, entries.computed, entries.first, out, lse)
        ctx.tile, ctx.shared = tile, shared
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        kv, gate, ape, places, first, out, lse = ctx.saved_tensors
        tile, (count, width), channels = ctx.tile, out.shape, kv.shape[1]
        numbers = len(ape) * channels // width
        across = triton.cdiv(width, tile["BLOCK"]), triton.cdiv(numbers, tile["TOKENS"])
        group = max(1, count * across[0] * across[1] // PROGRAMS)
        groups = triton.cdiv(count, group)
        rows, dtype = (len(places), torch.float32) if ctx.shared else (len(kv), kv.dtype)
        dkv, dgate = torch.zeros(2, rows, channels, dtype=dtype, device=kv.device)
        dape = torch.empty(groups, numbers, width, dtype=torch.float32, device=kv.device)
        if count:
            kernel.pool_backward[(groups, *across)](
                grad.contiguous(), out, lse, kv, gate, ape, places, first, dkv, dgate, dape, count, width, group,
                kv.stride(0), gate.stride(0), channels, SHARED=ctx.shared, **tile,
            )  # fmt: skip
        if ctx.shared:
            dkv, dgate = (dkv.new_zeros(kv.shape).index_add_(0, places, each).to(kv.dtype) for each in (dkv, dgate))
        dape = dape.sum(0).view(-1, len(ape), width).transpose(0, 1).reshape(ape.shape)
        return dkv, dgate, dape.to(ape.dtype), None, None, None
