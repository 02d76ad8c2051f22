"""Masked cross-entropy: what supervised training minimises."""

from __future__ import annotations

from torch import Tensor

from model.kernels.logprob.op import token_logprobs
from runtime.objective import Rows


def cross_entropy(rows: Rows, weight: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum -log p(target) over the targets of a packed row.

    Args:
        rows: the predicting positions.
        weight: [V, D] the head.

    Returns:
        [] fp32 nats, summed; metrics `loss` and `entropy`, summed.
    """
    logprobs, entropy = token_logprobs(rows.hidden, weight, rows.targets)
    loss = -logprobs.sum()
    return loss, {"loss": loss, "actor/entropy": entropy.sum()}
