"""The routed experts as grouped matrix products over the tokens sorted by expert."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def swiglu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """Clamp and gate: silu(min(gate, limit)) * clamp(up, -limit, limit). Source: v4_spec 4."""
    return functional.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)


def routed_experts(x: Tensor, indices: Tensor, weights: Tensor, matrices: tuple[Tensor, Tensor, Tensor], *, limit: float) -> Tensor:
    """Sum each token's chosen experts, sum_a w_a W2_e (silu(min(W1_e x, l)) * clamp(W3_e x, -l, l)).

    Args:
        x: [T, D].
        indices: [T, A] int64, distinct experts a token.
        weights: [T, A] fp32.
        matrices: w1 [E, F, D], w2 [E, D, F], w3 [E, F, D].
        limit: clamp of the two branches.

    Returns:
        [T, D] in the dtype of `x`, summed in fp32.

    Source: v4_spec 4.
    """
    w1, w2, w3 = matrices
    tokens, active = indices.shape
    order = torch.argsort(indices.flatten(), stable=True)  # [T * A] slots by expert
    ends = torch.bincount(indices.flatten(), minlength=len(w1)).cumsum(0).to(torch.int32)
    sorted_x = x.index_select(0, order // active)
    gate = functional.grouped_mm(sorted_x, w1.mT, offs=ends)
    up = functional.grouped_mm(sorted_x, w3.mT, offs=ends)
    out = functional.grouped_mm(swiglu(gate, up, limit), w2.mT, offs=ends)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    parts = out.index_select(0, place).view(tokens, active, -1)
    return torch.bmm(weights.unsqueeze(1), parts.float()).squeeze(1).to(x.dtype)
