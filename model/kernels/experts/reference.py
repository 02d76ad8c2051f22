"""The definition of the routed experts: every expert on every token, weighted."""

from __future__ import annotations

import torch
from torch import Tensor


def routed_experts(x: Tensor, indices: Tensor, weights: Tensor, matrices: tuple[Tensor, Tensor, Tensor], *, limit: float) -> Tensor:
    """Compute `op.routed_experts` densely; the arguments are the same."""
    w1, w2, w3 = (m.float() for m in matrices)
    gate = torch.einsum("td,efd->tef", x.float(), w1).clamp(max=limit)
    up = torch.einsum("td,efd->tef", x.float(), w3).clamp(-limit, limit)
    out = torch.einsum("tef,edf->ted", torch.nn.functional.silu(gate) * up, w2)
    share = torch.zeros(len(x), len(w1), device=x.device).scatter_add(1, indices, weights.float())
    return torch.einsum("te,ted->td", share, out).to(x.dtype)
