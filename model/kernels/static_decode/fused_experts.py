"""The routed experts of a decoding step on a GPU: four launches, nothing sorted and nothing waited for; arguments as in `op`."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from model.kernels.experts.kernel import sum_rows
from model.kernels.static_decode.kernel_experts import group, multiply

PAIRS = {"BLOCK": 1024, "num_warps": 4}
COPY = {"BLOCK": 2048, "num_warps": 4}

FEW = {"ROWS": 16, "COLUMNS": 64, "BLOCK": 64, "STAGES": 5, "num_warps": 4}
"""Where experts have a tile of this many rows on average: reading the weights is all."""
SOME = {"ROWS": 64, "COLUMNS": 64, "BLOCK": 64, "STAGES": 4, "num_warps": 4}
"""Where they have more, and for the two products into the experts however many they have."""
MANY = {"ROWS": 128, "COLUMNS": 128, "BLOCK": 64, "STAGES": 3, "num_warps": 8}
"""Out of experts that have more than a tile of `SOME`."""


def experts(x: Tensor, indices: Tensor, shares: Tensor, matrices: tuple[Tensor, Tensor, Tensor], *, limit: float) -> Tensor:
    """Compute `op.experts`."""
    (w1, w2, w3), (tokens, active) = matrices, indices.shape
    order, slots, ends = grouped(indices, len(w1))
    into, back = _tiles(len(order) / len(w1))
    hidden = _multiply(x, (order, ends), (w1, w3), gate=(shares.contiguous(), limit), tile=into)
    summands = _multiply(hidden, (order, ends), (w2, w2), gate=None, tile=back)
    out, width = torch.empty_like(x), x.shape[1]
    copy = COPY | {"BLOCK": min(COPY["BLOCK"], triton.next_power_of_2(width))}
    sum_rows[(tokens, triton.cdiv(width, copy["BLOCK"]))](summands, summands, slots, out, active, width, False, **copy)
    return out


def _tiles(rows: float) -> tuple[dict[str, int], dict[str, int]]:
    """Return the tiles of the products into and out of experts that have so many rows on average."""
    into = FEW if rows <= FEW["ROWS"] else SOME
    return into, into if rows <= SOME["ROWS"] else MANY


def grouped(indices: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Bring (token, choice) pairs [B, A] into the experts' order: the pair in each place, each pair's place [B * A], ends [E] int32."""
    order, slots = torch.empty_like(indices).flatten(), torch.empty_like(indices).flatten()
    ends = torch.empty(experts, device=indices.device, dtype=torch.int32)
    group[(experts,)](indices, order, slots, ends, indices.numel(), **PAIRS)
    return order, slots, ends


def _multiply(
    x: Tensor, where: tuple[Tensor, Tensor], weights: tuple[Tensor, Tensor], *, gate: tuple[Tensor, float] | None, tile: dict[str, int]
) -> Tensor:
    """Multiply the pairs by their experts' matrices [E, N, K]: [B * A, N] in the experts' order.

    With `gate`, shares [B, A] and the clamp, `x` is in the tokens' order and the two products are gated; without, one of rows in order.
    """
    (order, ends), (count, outputs, width) = where, weights[0].shape
    out = x.new_empty(len(order), outputs)
    tiles = min(len(order), triton.cdiv(len(order), tile["ROWS"]) + count)  # every expert may have one that is not full
    shares, limit = (out, 0.0) if gate is None else gate
    multiply[(tiles, triton.cdiv(outputs, tile["COLUMNS"]))](
        x, order, ends, *weights, shares, out, count, width, outputs, 1 if gate is None else shares.shape[1], limit,
        GATED=gate is not None, EXPERTS=triton.next_power_of_2(count), **tile,
    )  # fmt: skip
    return out
