"""Launches of the normalisation and rotation, and their gradients: each reads its rows once and writes them once."""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.kernels.rotary_norm import kernel

TILE = 1024
"""Numbers a program handles at a time, if a row is not longer."""
PER_WARP = 512
FEW, FEW_PER_WARP = 512, 256
"""Rows of which each has a program of its own, and more warps: what a decoding step has, whose time is that of one row."""
PROGRAMS = 2112
"""Programs of up to four warps that sum a weight's gradient: sixteen for each processor of an H200."""


def normalise(x: Tensor, weight: Tensor | None, turns: Tensor | None, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    """Divide by the root mean square, scale, and rotate the last dimensions: R(w x rsqrt(mean x^2 + eps)).

    Args:
        x: [T, ..., K]; as [T, K] its rows may lie apart.
        weight: [K], None for ones.
        turns: [T, ..., R'] complex64 as `model.rope.rotate` takes them, constant; None for no rotation.
        eps: added to the mean square.
        dtype: of the result, by default that of `x`.

    Returns:
        [T, ..., K] contiguous; computed in fp32.
    """
    return _Normalise.apply(x, weight, turns, eps, dtype)


def rotate(x: Tensor, turns: Tensor, *, inverse: bool = False) -> Tensor:
    """Rotate the last 2R' dimensions in adjacent pairs, backwards if `inverse`; arguments and result as of `normalise`."""
    return _Rotate.apply(x, turns, inverse)


def _rows(x: Tensor) -> Tensor:
    """View `x` as rows [N, K] whose numbers are adjacent; copied only if it has to be."""
    return x if x.ndim == 2 and x.stride(1) == 1 else x.contiguous().view(-1, x.shape[-1])


def _angles(rows: Tensor, turns: Tensor | None) -> tuple[Tensor, int, int]:
    """Return the turns as real numbers, how many pairs they rotate, and how many rows share one token's."""
    if turns is None:
        return rows, 0, 1
    pairs = turns.shape[-1]
    tokens = turns.numel() // pairs
    assert len(rows) % max(tokens, 1) == 0 and rows.shape[1] % 2 == 0, (rows.shape, turns.shape)
    return torch.view_as_real(turns.contiguous()), pairs, len(rows) // max(tokens, 1)


def _tile(width: int) -> dict[str, int]:
    block = triton.next_power_of_2(width)
    return {"ROWS": max(1, TILE // block), "BLOCK": block, "num_warps": min(8, max(2, block // PER_WARP))}


def _forward(x: Tensor, norm: tuple[Tensor | None, float] | None, turns: Tensor | None, dtype: torch.dtype, *, sign: float = 1.0) -> Tensor:
    """Run the forward kernel; without `norm`, weight and eps, it only rotates."""
    rows, (weight, eps) = _rows(x), norm or (None, 0.0)
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    angles, pairs, heads = _angles(rows, turns)
    tile = _tile(rows.shape[1])
    if len(rows) <= FEW:
        tile |= {"ROWS": 1, "num_warps": max(1, min(8, tile["BLOCK"] // FEW_PER_WARP))}
    if len(rows):
        kernel.normalise_rows[(triton.cdiv(len(rows), tile["ROWS"]),)](
            rows, rows if weight is None else weight, angles, out, len(rows), heads, rows.shape[1], rows.stride(0), eps, sign,
            NORM=norm is not None, WEIGHT=weight is not None, PAIRS=pairs, **tile,
        )  # fmt: skip
    return out


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor | None, turns: Tensor | None, eps: float, dtype: torch.dtype | None) -> Tensor:
        ctx.save_for_backward(x, weight, turns)
        ctx.eps = eps
        return _forward(x, (weight, eps), turns, dtype or x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        x, weight, turns = ctx.saved_tensors
        rows = _rows(x)
        count, width = rows.shape
        angles, pairs, heads = _angles(rows, turns)
        tile = _tile(width)
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        tiles = triton.cdiv(count, tile["ROWS"])
        programs = tiles if weight is None else min(tiles, PROGRAMS * 4 // max(4, tile["num_warps"]))
        dweight = dx if weight is None else torch.empty(programs, width, dtype=torch.float32, device=x.device)
        if programs:
            kernel.normalise_rows_backward[(programs,)](
                grad.contiguous(), rows, rows if weight is None else weight, angles, dx, dweight, count, heads, width, rows.stride(0),
                ctx.eps, WEIGHT=weight is not None, PAIRS=pairs, **tile,
            )  # fmt: skip
        return dx, None if weight is None else dweight.sum(0).to(weight.dtype), None, None, None


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, turns: Tensor, inverse: bool) -> Tensor:
        ctx.save_for_backward(turns)
        ctx.inverse = inverse
        return _forward(x, None, turns, x.dtype, sign=-1.0 if inverse else 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (turns,) = ctx.saved_tensors
        return _forward(grad, None, turns, grad.dtype, sign=1.0 if ctx.inverse else -1.0), None, None
