"""Log-probabilities of given tokens from hidden states and a head: which implementation runs."""

from __future__ import annotations

from torch import Tensor

from model.kernels.choice import implementation_for
from model.kernels.logprob import reference


def token_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, *, chunk: int = 4096) -> tuple[Tensor, Tensor]:
    """Compute log p(target) and the entropy of p = softmax(hidden @ weight^T), in fp32.

    Args:
        hidden: [R, D] last hidden states, one a target.
        weight: [V, D] the head.
        targets: [R] int64 token ids.
        chunk: rows whose logits exist at once; where it holds all rows they are kept for the backward pass.

    Returns:
        log-probs [R] fp32, nats, differentiable in `hidden` and `weight`; entropy [R] fp32, nats, detached.

    Source: ours.
    """
    if implementation_for(hidden) == "reference":
        return reference.token_logprobs(hidden, weight, targets, chunk=chunk)
    from model.kernels.logprob import chunked  # brings Triton, which a CPU does without

    return chunked.TokenLogprobs.apply(hidden, weight, targets.contiguous(), chunk)
