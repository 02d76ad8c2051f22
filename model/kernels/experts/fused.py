"""The routed experts on a GPU: the library's grouped products, and one kernel for everything between two of them."""

from __future__ import annotations

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


def _spread(x: Tensor, slots: Tensor, active: int) -> Tensor:
    """Lay tokens [T, D] out, each (token, choice) pair in the row that `slots` [T * A] gives it."""
    out = x.new_empty(len(slots), x.shape[1])
    grid, tile = _tiles(*x.shape)
    spread_tokens[grid](x, slots, out, active, x.shape[1], **tile)
    return out


def _sum(pairs: Tensor, others: Tensor | None, slots: Tensor, active: int, *, beside: Tensor | None = None) -> Tensor:
    """Bring rows [T * A, D] (and others like them) back into the tokens' order and sum each token's A (and `beside`) in fp32: [T, D]."""
    out = pairs.new_empty(len(slots) // active, pairs.shape[1])
    grid, tile = _tiles(*out.shape)
    both = others is not None
    sum_rows[grid](pairs, others if both else pairs, slots, out, active, pairs.shape[1], both, beside=beside, **tile)
    return out


class RoutedExperts(torch.autograd.Function):
    """As in `op`, but rows are not padded, nothing waits for the device, and the activation is computed again backward.

    `beside` [T, D] is added to the result.
    """

    @staticmethod
    def forward(
        ctx, x: Tensor, indices: Tensor, weights: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, limit: float, beside: Tensor | None = None
    ) -> Tensor:
        x, share, active = x.contiguous(), weights.contiguous(), indices.shape[1]
        chosen, order = torch.sort(indices.flatten().to(torch.int16), stable=True)  # a radix sort takes its time by the bit
        ends = torch.searchsorted(chosen, torch.arange(len(w1), dtype=torch.int16, device=x.device), right=True, out_int32=True)
        slots = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device))
        rows = _spread(x, slots, active)
        gate, up = (functional.grouped_mm(rows, w.mT, offs=ends) for w in (w1, w3))
        hidden = torch.empty_like(gate)
        grid, tile = _tiles(*gate.shape)
        gate_rows[grid](gate, up, share, order, hidden, gate.shape[1], limit, **tile)
        beside = None if beside is None else beside.contiguous()
        out = _sum(functional.grouped_mm(hidden, w2.mT, offs=ends), None, slots, active, beside=beside)
        ctx.save_for_backward(rows, share, gate, up, w1, w2, w3, slots, order, ends)
        ctx.limit = limit
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        rows, share, gate, up, w1, w2, w3, slots, order, ends = ctx.saved_tensors
        dout = _spread(grad.contiguous(), slots, share.shape[1])
        dhidden = functional.grouped_mm(dout, w2, offs=ends)
        dgate, dup, hidden, dshare = (torch.empty_like(t) for t in (gate, up, gate, share))
        count, width = gate.shape
        gate_rows_backward[(triton.cdiv(count, BACKWARD["ROWS"]),)](
            dhidden, gate, up, share, order, dgate, dup, hidden, dshare, count, width, ctx.limit, **BACKWARD
        )
        dw2 = functional.grouped_mm(dout.mT, hidden, offs=ends)
        dw1, dw3 = (functional.grouped_mm(d.mT, rows, offs=ends) for d in (dgate, dup))
        first, second = functional.grouped_mm(dgate, w1, offs=ends), functional.grouped_mm(dup, w3, offs=ends)
        beside = grad if ctx.needs_input_grad[7] else None
        return _sum(first, second, slots, share.shape[1]), None, dshare, dw1, dw2, dw3, None, beside
