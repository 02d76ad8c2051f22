"""The definition of the router's scores, weights and balance loss, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from model.kernels.router.rule import Rule


def scores(x: Tensor, weight: Tensor, rule: Rule) -> Tensor:
    """Score [T, D] tokens for every expert, [T, E] in fp64."""
    logits = x.double() @ weight.double().T
    return torch.sigmoid(logits) if rule.scoring == "sigmoid" else functional.softplus(logits).sqrt()


def weigh(score: Tensor, indices: Tensor, rule: Rule) -> Tensor:
    """Weigh chosen experts [T, A] by their scores [T, E]."""
    weights = score.gather(1, indices)
    if rule.normalises:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * rule.scaling


def balance_loss(score: Tensor, indices: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Compute `fused.balance_loss` sample by sample."""
    total, (tokens, experts), active = score.new_zeros(()), score.shape, indices.shape[1]
    for first, last in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        some = score[first:last]
        share = (some / some.sum(-1, keepdim=True)).mean(0)
        chosen = functional.one_hot(indices[first:last].flatten(), experts).sum(0)
        total = total + (chosen * share).sum() * experts / active / tokens
    return total
