"""Accepting drafted tokens so that what comes out is distributed exactly as the model alone would have sampled it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from runtime.generation.sampler import choose


class Verdicts(NamedTuple):
    """What became of one drafted token a row.

    Attributes:
        accepted: [B] bool.
        tokens: [B] int64, the draft where it was accepted, otherwise one drawn from what the draft left over.
        logprobs: [B] fp32, nats, of `tokens` under the model.
    """

    accepted: Tensor
    tokens: Tensor
    logprobs: Tensor


def verify(logits: Tensor, draft_logits: Tensor, drafts: Tensor, draws: Tensor | None, temperature: float) -> Verdicts:
    """Accept each draft d with probability min(1, p(d) / q(d)); otherwise draw from max(p - q, 0), normalised.

    The token is then distributed as p, whatever q is: q(x) min(1, p(x) / q(x)) + P(refused) max(p(x) - q(x), 0) / P(refused) = p(x).
    Greedy, a draft is accepted where it is the model's own choice.

    Args:
        logits: [B, V] fp32 of the model, p.
        draft_logits: [B, V] fp32 that the drafts were drawn from, q.
        drafts: [B] int64.
        draws: [B, 2] fp32 in [0, 1), for accepting and for drawing anew; None is greedy.
        temperature: divides both logits.

    Source: Leviathan et al. 2023, algorithm 1.
    """
    if draws is None:
        tokens, logprobs = choose(logits, None, temperature)
        return Verdicts(tokens == drafts, tokens, logprobs)
    log_p, log_q = (torch.log_softmax(each / temperature, -1) for each in (logits, draft_logits))
    mine = drafts[:, None]
    accepted = draws[:, 0].clamp_min(1e-30).log() < (log_p.gather(1, mine) - log_q.gather(1, mine))[:, 0]
    left = (log_p.exp() - log_q.exp()).clamp_min(0)
    left = torch.where(left.sum(-1, keepdim=True) > 0, left, log_p.exp())  # p = q: nothing is ever refused but for rounding
    cumulative = left.cumsum(-1)
    anew = torch.searchsorted(cumulative, draws[:, 1:] * cumulative[:, -1:], right=True)[:, 0].clamp_(max=logits.shape[1] - 1)
    tokens = torch.where(accepted, drafts, anew)
    return Verdicts(accepted, tokens, log_p.gather(1, tokens[:, None])[:, 0])
