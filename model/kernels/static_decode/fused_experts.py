"""The routed experts of a decoding step on a GPU: tokens are counted into the experts' order, not sorted; arguments as in `op`."""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from torch.nn import functional

from model.kernels.experts.kernel import gate_rows, spread_rows, sum_rows
from model.kernels.static_decode import kernel_experts

PAIRS = {"BLOCK": 1024, "num_warps": 4}
COPY = {"BLOCK": 2048, "num_warps": 4}


def experts(x: Tensor, indices: Tensor, shares: Tensor, matrices: tuple[Tensor, Tensor, Tensor], *, limit: float) -> Tensor:
    """Compute `op.experts`."""
    (w1, w2, w3), active = matrices, indices.shape[1]
    order, slots, ends = group(indices, len(w1))
    pairs, width, inner = len(order), x.shape[1], w1.shape[1]
    rows, out = x.new_empty(pairs, width), torch.empty_like(x)
    spread_rows[_grid(pairs, width)](x, order, rows, active, width, **_tile(width))
    gated, up = (functional.grouped_mm(rows, w.mT, offs=ends) for w in (w1, w3))
    hidden = torch.empty_like(gated)
    gate_rows[_grid(pairs, inner)](gated, up, shares, order, hidden, inner, limit, **_tile(inner))
    summands = functional.grouped_mm(hidden, w2.mT, offs=ends)
    sum_rows[_grid(len(x), width)](summands, summands, slots, out, active, width, False, **_tile(width))
    return out


def group(indices: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Bring (token, choice) pairs [B, A] into the experts' order: the pair in each place, each pair's place [B * A], ends [E] int32."""
    order, slots = torch.empty_like(indices).flatten(), torch.empty_like(indices).flatten()
    ends = torch.empty(experts, device=indices.device, dtype=torch.int32)
    kernel_experts.group[(experts,)](indices, order, slots, ends, indices.numel(), **PAIRS)
    return order, slots, ends


def _tile(width: int) -> dict[str, int]:
    return COPY | {"BLOCK": min(COPY["BLOCK"], triton.next_power_of_2(width))}


def _grid(rows: int, width: int) -> tuple[int, int]:
    return rows, triton.cdiv(width, _tile(width)["BLOCK"])
