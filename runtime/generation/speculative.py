"""Speculative decoding: the MTP block drafts, the model judges, and what comes out is distributed exactly as the model alone samples."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from model import drafting
from model.cache import Cache
from model.transformer import Transformer
from runtime.generation.rows import Row, Turns, advance
from runtime.generation.sampler import choose

DRAWS = 3
"""Random numbers a token: to accept its draft, to draw it, to draft it."""
_ACCEPT, _DRAW, _DRAFT = range(DRAWS)


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


@torch.no_grad()
def decode_speculatively(rows: list[Row], logits: Tensor, model: Transformer, cache: Cache, turns: Turns) -> None:
    """Finish the rows, up to two tokens a row and pass.

    Args:
        rows: just prefilled, `draws` with `DRAWS` numbers a token.
        logits: [B, V] of each row's first token.
        model: with an MTP block.
        cache: as `drafting.prefill` left it, one row each.
        turns: what happens when a turn ends.
    """
    first, first_logprobs = choose(logits, _draws(rows, (_DRAW,), logits), turns.sampling.temperature)
    kept = [
        _take(row, [(token, logprob)], turns) for row, token, logprob in zip(rows, first.tolist(), first_logprobs.tolist(), strict=True)
    ]
    while True:
        rows, cache, kept = _alive(rows, cache, kept, turns)
        if not rows:
            return
        draft_logits = _draft(rows, model, cache, kept)
        drafts, _ = choose(draft_logits, _draws(rows, (_DRAFT,), logits), turns.sampling.temperature)
        drafts = torch.tensor([r.given[0] if r.given else d for r, d in zip(rows, drafts.tolist(), strict=True)], device=logits.device)
        newest = torch.tensor([row.tokens[-1] for row in rows], device=logits.device)
        judged = model.head(drafting.judge(model, torch.stack([newest, drafts]), cache).flatten(0, 1)).unflatten(0, (2, -1))
        verdicts = verify(judged[0], draft_logits, drafts, _draws(rows, (_ACCEPT, _DRAW), logits), turns.sampling.temperature)
        after, after_logprobs = choose(judged[1], _draws(rows, (_DRAW,), logits, second=True), turns.sampling.temperature)
        kept = []
        for i, row in enumerate(rows):
            offered = [(int(verdicts.tokens[i]), float(verdicts.logprobs[i]))]
            if row.given or bool(verdicts.accepted[i]):
                offered.append((int(after[i]), float(after_logprobs[i])))
            if not row.given:
                row.drafted, row.accepted = row.drafted + 1, row.accepted + int(verdicts.accepted[i])
            kept.append(_take(row, offered, turns))


class _Kept(NamedTuple):
    """What a pass left of one row: tokens appended, and whether its turn is over."""

    tokens: int
    over: bool


def _take(row: Row, offered: list[tuple[int, float]], turns: Turns) -> _Kept:
    """Append what is offered, or given, until the turn ends; the newest token always stays outside the cache."""
    for count, (token, logprob) in enumerate(offered, 1):
        if advance(row, token, logprob, eos=turns.tokenizer.eos, budget=turns.sampling.max_new_tokens, limit=turns.limit):
            return _Kept(count, True)
    return _Kept(len(offered), False)


def _alive(rows: list[Row], cache: Cache, kept: list[_Kept], turns: Turns) -> tuple[list[Row], Cache, list[_Kept]]:
    """End the turns that are over and drop the rows that are done."""
    if ended := [row for row, each in zip(rows, kept, strict=True) if each.over]:
        turns.end(ended)
        alive = [i for i, row in enumerate(rows) if not row.done]
        if alive and len(alive) < len(rows):
            cache = cache.select(torch.tensor(alive, device=cache.positions.device))
        rows, kept = [rows[i] for i in alive], [kept[i] for i in alive]
    return rows, cache, kept


def _draft(rows: list[Row], model: Transformer, cache: Cache, kept: list[_Kept]) -> Tensor:
    """Set the positions to what was kept, and return the logits [B, V] that the next drafts are drawn from."""
    assert cache.streams is not None
    device, most = cache.positions.device, len(cache.streams)
    counts = torch.tensor([each.tokens for each in kept], device=device)
    cache.positions.copy_(torch.tensor([len(row.tokens) - 1 for row in rows], device=device))
    # Of a row that kept one of two tokens the second place is computed for nothing and overwritten by the next pass.
    following = torch.tensor(
        [[row.tokens[min(i - each.tokens, -1)] for row, each in zip(rows, kept, strict=True)] for i in range(most)], device=device
    )
    hidden = drafting.draft(model, following, cache.positions - counts, cache)
    return model.head(hidden[counts - 1, torch.arange(len(rows), device=device)])


def _draws(rows: list[Row], which: tuple[int, ...], like: Tensor, *, second: bool = False) -> Tensor | None:
    """Look up the random numbers of each row's next sampled token, or of a pass's second token: [B], [B, 2] for two; None when greedy."""
    if rows[0].draws is None:
        return None
    found = []
    for row in rows:
        assert row.draws is not None
        number = row.count + (second and not row.given)
        place = min(number, len(row.draws) // DRAWS - 1) * DRAWS
        found.append(row.draws[place : place + DRAWS])
    out = torch.from_numpy(np.stack(found)[:, which]).to(like.device)
    return out if len(which) > 1 else out[:, 0]
