"""The definition of the Sinkhorn iteration, one step after the other."""

from __future__ import annotations

from torch import Tensor


def sinkhorn(logits: Tensor, iterations: int, eps: float) -> Tensor:
    """Compute `op.sinkhorn` through autograd.

    Args:
        logits: [M, M, T], rows j first, columns k second.
        iterations: pairs of normalisations, the first row step being the softmax.
        eps: added to the softmax and to every sum.

    Returns:
        [M, M, T] close to doubly stochastic.

    Source: v4_spec 3; released inference code, `hc_split_sinkhorn`.
    """
    comb = logits.softmax(1) + eps
    comb = comb / (comb.sum(0, keepdim=True) + eps)
    for _ in range(iterations - 1):
        comb = comb / (comb.sum(1, keepdim=True) + eps)
        comb = comb / (comb.sum(0, keepdim=True) + eps)
    return comb
