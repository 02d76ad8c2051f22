"""The GRPO objective, token by token."""

from __future__ import annotations

import torch
from torch import Tensor

from model.kernels.logprob.op import token_logprobs
from runtime.objective import Rows


def grpo(
    rows: Rows, weight: Tensor, *, clip: tuple[float, float], kl_weight: float = 0.0, mask_nats: float = 0.0, temperature: float = 1.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum the negated GRPO objective over a packed row's sampled tokens.

    loss_t = -min(r A, clip(r, 1 - low, 1 + high) A) M + beta KL, r = pi / pi_rollout,
    KL = r (pi_ref / pi - log(pi_ref / pi) - 1), gradient through r too, M = 0 for samples of negative advantage whose mean
    log(pi_rollout / pi) exceeds `mask_nats`.

    Args:
        rows: fields `advantages`, `logprobs` (the rollout's own), and `reference_logprobs` when `kl_weight` > 0.
        weight: [V, D] the head.
        clip: (low, high).
        kl_weight: beta.
        mask_nats: 0 masks nothing.
        temperature: that the rollout sampled with.

    Returns:
        [] fp32, summed; metrics summed: `actor/entropy`, `actor/clip_fraction`, `actor/masked_fraction`, `actor/kl`, `mismatch_kl/mean`
        (k3 of rollout against trainer on the same tokens, nats), `loss`.

    Source: DeepSeek-V3.2 paper, section 3.1.
    """
    hidden = rows.hidden if temperature == 1.0 else rows.hidden / temperature
    logprobs, entropy = token_logprobs(hidden, weight, rows.targets)  # [R]
    log_ratio = logprobs - rows.fields["logprobs"]
    ratio = log_ratio.exp()
    advantages = rows.fields["advantages"]
    low, high = clip
    clipped = ratio.clamp(1 - low, 1 + high)
    objective = torch.minimum(ratio * advantages, clipped * advantages)
    kept = torch.ones_like(advantages)
    if mask_nats > 0:
        kept = off_policy_mask(log_ratio.detach(), advantages, rows, limit_nats=mask_nats)
        objective = objective * kept
    loss = -objective.sum()
    metrics = {
        "actor/entropy": entropy.sum(),
        "actor/clip_fraction": (clipped * advantages < ratio * advantages).float().sum(),
        "actor/masked_fraction": (1 - kept).sum(),
        "mismatch_kl/mean": (ratio - 1 - log_ratio).sum(),
    }
    if kl_weight > 0:
        to_reference = rows.fields["reference_logprobs"] - logprobs
        kl = (ratio * (to_reference.exp() - to_reference - 1)).sum()
        loss = loss + kl_weight * kl
        metrics["actor/kl"] = kl
    return loss, metrics | {"loss": loss}


def off_policy_mask(log_ratio: Tensor, advantages: Tensor, rows: Rows, *, limit_nats: float) -> Tensor:
    """Return [R] 0 on tokens of samples with negative advantage whose mean log(pi_rollout / pi) exceeds the limit, else 1.

    Args:
        log_ratio: [R] log(pi / pi_rollout), detached.
        advantages: [R], constant over a sample.
        rows: says which sample each token belongs to.
        limit_nats: delta of the paper.

    Source: DeepSeek-V3.2 paper, section 3.1.
    """
    counts = torch.zeros(rows.samples, device=log_ratio.device).index_add_(0, rows.sample, torch.ones_like(log_ratio))
    means = torch.zeros_like(counts).index_add_(0, rows.sample, -log_ratio) / counts.clamp_min(1)
    return 1 - ((advantages < 0) & (means[rows.sample] > limit_nats)).float()
