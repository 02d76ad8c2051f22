"""The routed experts on a GPU: the library's grouped products, and one kernel for everything between two of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from model.kernels.experts.kernel import gate_rows, gate_rows_backward, spread_tokens, sum_rows

COPY = {"BLOCK": 2048, "num_warps": 4}
BACKWARD = {"ROWS": 16, "BLOCK": 128, "num_warps": 4}


def _tiles(rows: int, width: int) -> tuple[tuple[int, int], dict[str, int]]:
    tile = COPY | {"BLOCK": min(COPY["BLOCK"], triton.next_power_of_2(width))}
    return (rows, triton.cdiv(width, tile["BLOCK"])), tile


def spread(x: Tensor, slots: Tensor, active: int) -> Tensor:
    """Lay tokens [T, D] out, each (token, choice) pair in the row that `slots` [T * A] gives it."""
    out = x.new_empty(len(slots), x.shape[1])
    grid, tile = _tiles(*x.shape)
    spread_tokens[grid](x, slots, out, active, x.shape[1], **tile)
    return out


def sum_pairs(pairs: Tensor, others: Tensor | None, slots: Tensor, active: int, *, beside: Tensor | None = None) -> Tensor:
    """Bring rows [T * A, D] (and others like them) back into the tokens' order and sum each token's A (and `beside`) in fp32: [T, D]."""
    out = pairs.new_empty(len(slots) // active, pairs.shape[1])
    grid, tile = _tiles(*out.shape)
    both = others is not None
    sum_rows[grid](pairs, others if both else pairs, slots, out, active, pairs.shape[1], both, beside=beside, **tile)
    return out


def _two(parts: Sequence[Tensor]) -> Sequence[Tensor]:
    """Name what belongs to the gate and to the up matrices: two tensors, or the halves of dimension 1 of one."""
    return parts if len(parts) == 2 else parts[0].chunk(2, 1)


class RoutedExperts(torch.autograd.Function):
    """As in `op`, but rows are not padded, nothing waits for the device, and the activation is computed again backward.

    Gate and up matrices make one product where the rows are more than theirs, which have to be copied for it.
    """

    @staticmethod
    def forward(
        ctx, x: Tensor, indices: Tensor, weights: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, limit: float, beside: Tensor | None = None
    ) -> Tensor:
        x, share, active = x.contiguous(), weights.contiguous(), indices.shape[1]
        chosen, order = torch.sort(indices.flatten().to(torch.int16), stable=True)  # a radix sort takes its time by the bit
        ends = torch.searchsorted(chosen, torch.arange(len(w1), dtype=torch.int16, device=x.device), right=True, out_int32=True)
        slots = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device))
        rows = spread(x, slots, active)
        maps = (torch.cat([w1, w3], 1),) if len(rows) >= 2 * w1.shape[0] * w1.shape[1] else (w1, w3)
        parts = [functional.grouped_mm(rows, each.mT, offs=ends) for each in maps]
        hidden = x.new_empty(len(rows), w1.shape[1])
        grid, tile = _tiles(*hidden.shape)
        gate_rows[grid](*_two(parts), share, order, hidden, hidden.shape[1], limit, BESIDE=len(parts) == 1, **tile)
        beside = None if beside is None else beside.contiguous()
        out = sum_pairs(functional.grouped_mm(hidden, w2.mT, offs=ends), None, slots, active, beside=beside)
        ctx.save_for_backward(rows, share, w2, slots, order, ends, *maps, *parts)
        ctx.limit, ctx.adds = limit, beside is not None
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        rows, share, w2, slots, order, ends, *both = ctx.saved_tensors
        maps, parts = both[: len(both) // 2], both[len(both) // 2 :]
        dout = spread(grad.contiguous(), slots, share.shape[1])
        dhidden = functional.grouped_mm(dout, w2, offs=ends)
        hidden, dshare, *dparts = (torch.empty_like(t) for t in (dhidden, share, *parts))
        count, width = hidden.shape
        gate_rows_backward[(triton.cdiv(count, BACKWARD["ROWS"]),)](
            dhidden, *_two(parts), share, order, *_two(dparts), hidden, dshare, count, width, ctx.limit, BESIDE=len(parts) == 1, **BACKWARD
        )
        dw2 = functional.grouped_mm(dout.mT, hidden, offs=ends)
        dw1, dw3 = _two([functional.grouped_mm(d.mT, rows, offs=ends) for d in dparts])
        first, *second = (functional.grouped_mm(d, each, offs=ends) for d, each in zip(dparts, maps, strict=True))
        dx = sum_pairs(first, second[0] if second else None, slots, share.shape[1])
        return dx, None, dshare, dw1, dw2, dw3, None, grad if ctx.adds else None
