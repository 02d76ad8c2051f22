"""The router between its product and the experts: scores, choice, weights, sums for the balance loss; and the gradients, in fp32."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _logits(raw, rows, experts, inside, lines, EXPERTS: tl.constexpr, PARTS: tl.constexpr):
    """Add up the PARTS products [T, PARTS * E] of some tokens."""
    at = raw + rows.to(tl.int64)[:, None] * (PARTS * EXPERTS) + experts[None, :]
    mask = lines[:, None] & inside[None, :]
    total = tl.load(at, mask, 0.0)
    if PARTS == 2:
        total += tl.load(at + EXPERTS, mask, 0.0)
    return total


@triton.jit
def _score(logits, SIGMOID: tl.constexpr):
    """sigmoid(z), or sqrt(log(1 + e^z)) that stays exact where e^z is far below one rounding of 1."""
    if SIGMOID:
        return tl.sigmoid(logits)
    small = tl.exp(-tl.abs(logits))
    one = 1.0 + small
    log = tl.where(one == 1.0, small, tl.log(one) * small / tl.where(one == 1.0, 1.0, one - 1.0))
    return tl.sqrt(tl.maximum(logits, 0.0) + log)


@triton.jit
def route(raw, bias, indices, weights, scores, counts, tokens, scaling, CHOOSE: tl.constexpr, SIGMOID: tl.constexpr,
          NORMALISE: tl.constexpr, EXPERTS: tl.constexpr, PARTS: tl.constexpr, ACTIVE: tl.constexpr, ROWS: tl.constexpr,
          BLOCK: tl.constexpr, PLACES: tl.constexpr):  # fmt: skip
    """Score tokens, choose the ACTIVE experts of the highest score + bias (unless `indices` says which), weigh and count them.

    scores [T, E]; indices, weights [T, A]; counts [programs, E], how many tokens of this program chose each expert.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    experts, places = tl.arange(0, BLOCK), tl.arange(0, PLACES)
    seen, inside = rows < tokens, experts < EXPERTS
    score = _score(_logits(raw, rows, experts, inside, seen, EXPERTS, PARTS), SIGMOID)
    tl.store(scores + rows.to(tl.int64)[:, None] * EXPERTS + experts[None, :], score, seen[:, None] & inside[None, :])
    if CHOOSE:
        left = tl.where(inside[None, :], score + tl.load(bias + experts, inside, 0.0).to(tl.float32)[None, :], float("-inf"))
    picked = tl.zeros([ROWS, BLOCK], tl.float32)
    kept, chosen = tl.zeros([ROWS, PLACES], tl.float32), tl.zeros([ROWS, PLACES], tl.int64)
    for place in tl.static_range(ACTIVE):
        if CHOOSE:
            best = tl.argmax(left, 1)
            left = tl.where(experts[None, :] == best[:, None], float("-inf"), left)
        else:
            best = tl.load(indices + rows * ACTIVE + place, seen, 0).to(tl.int32)
        here = experts[None, :] == best[:, None]
        picked += tl.where(here & seen[:, None], 1.0, 0.0)
        now = (places == place)[None, :]
        kept = tl.where(now, tl.sum(tl.where(here, score, 0.0), 1)[:, None], kept)
        chosen = tl.where(now, best[:, None].to(tl.int64), chosen)
    if NORMALISE:
        kept /= tl.sum(kept, 1)[:, None] + 1e-20
    at = rows[:, None] * ACTIVE + places[None, :]
    mask = seen[:, None] & (places < ACTIVE)[None, :]
    tl.store(weights + at, kept * scaling, mask)
    if CHOOSE:
        tl.store(indices + at, chosen, mask)
    tl.store(counts + tl.program_id(0) * EXPERTS + experts, tl.sum(picked, 0), inside)


@triton.jit
def route_backward(raw, indices, dweights, dscores, dlogits, tokens, scaling, BALANCED: tl.constexpr, SIGMOID: tl.constexpr,
                   NORMALISE: tl.constexpr, HALVES: tl.constexpr, EXPERTS: tl.constexpr, PARTS: tl.constexpr,
                   ACTIVE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Gradient of the logits [T, E], through weights and (with BALANCED) scores; with HALVES as two narrow numbers, [T, 2 E]."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    experts = tl.arange(0, BLOCK)
    seen, inside = rows < tokens, experts < EXPERTS
    mask = seen[:, None] & inside[None, :]
    logits = _logits(raw, rows, experts, inside, seen, EXPERTS, PARTS)
    score = _score(logits, SIGMOID)
    kept, grad = tl.zeros([ROWS, BLOCK], tl.float32), tl.zeros([ROWS, BLOCK], tl.float32)
    for place in tl.static_range(ACTIVE):
        at = rows * ACTIVE + place
        here = experts[None, :] == tl.load(indices + at, seen, 0).to(tl.int32)[:, None]
        kept += tl.where(here, score, 0.0)
        grad += tl.where(here, tl.load(dweights + at, seen, 0.0)[:, None], 0.0)
    grad *= scaling
    if NORMALISE:
        total = tl.sum(kept, 1) + 1e-20
        along = tl.sum(grad * kept, 1) / total
        grad = tl.where(kept > 0, grad - along[:, None], 0.0) / total[:, None]
    wide = rows.to(tl.int64)[:, None]
    if BALANCED:
        grad += tl.load(dscores + wide * EXPERTS + experts[None, :], mask, 0.0)
    if SIGMOID:
        grad *= score * (1 - score)
    else:
        grad *= tl.where(score > 0, tl.sigmoid(logits) / (2 * tl.where(score > 0, score, 1.0)), 0.0)
    if HALVES:
        to = dlogits + wide * (2 * EXPERTS) + experts[None, :]
        high = grad.to(dlogits.dtype.element_ty)
        tl.store(to, high, mask)
        tl.store(to + EXPERTS, (grad - high.to(tl.float32)).to(dlogits.dtype.element_ty), mask)
    else:
        tl.store(dlogits + wide * EXPERTS + experts[None, :], grad, mask)


@triton.jit
def balance(scores, indices, ends, sums, samples, EXPERTS: tl.constexpr, ACTIVE: tl.constexpr, ROWS: tl.constexpr,
            BLOCK: tl.constexpr):  # fmt: skip
    """Sum choices and shares s / sum s of every n-th tile of a sample's tokens: sums [n, N, 2, E]; `ends` [N + 1] from 0."""
    sample, part = tl.program_id(0), tl.program_id(1)
    experts = tl.arange(0, BLOCK)
    inside = experts < EXPERTS
    last = tl.load(ends + sample + 1)
    chosen, shares = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(tl.load(ends + sample) + part * ROWS, last, tl.num_programs(1) * ROWS):
        rows = start + tl.arange(0, ROWS)
        seen = rows < last
        score = tl.load(scores + rows[:, None] * EXPERTS + experts[None, :], seen[:, None] & inside[None, :], 0.0)
        shares += tl.sum(score / tl.where(seen, tl.sum(score, 1), 1.0)[:, None], 0)
        for place in tl.static_range(ACTIVE):
            best = tl.load(indices + rows * ACTIVE + place, seen, -1).to(tl.int32)
            chosen += tl.sum(tl.where(experts[None, :] == best[:, None], 1.0, 0.0), 0)
    at = sums + (part * samples + sample).to(tl.int64) * (2 * EXPERTS) + experts
    tl.store(at, chosen, inside)
    tl.store(at + EXPERTS, shares, inside)


@triton.jit
def balance_backward(scores, sample, each, dscores, tokens, EXPERTS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Gradient of the scores, given that of each sample's sum of shares, [N, E]."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    experts = tl.arange(0, BLOCK)
    seen = rows < tokens
    mask = seen[:, None] & (experts < EXPERTS)[None, :]
    at = rows.to(tl.int64)[:, None] * EXPERTS + experts[None, :]
    score = tl.load(scores + at, mask, 0.0)
    total = tl.where(seen, tl.sum(score, 1), 1.0)[:, None]
    d = tl.load(each + tl.load(sample + rows, seen, 0)[:, None] * EXPERTS + experts[None, :], mask, 0.0)
    tl.store(dscores + at, (d - tl.sum(d * score, 1)[:, None] / total) / total, mask)
