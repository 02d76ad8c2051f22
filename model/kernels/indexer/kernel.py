"""Scores of a block of queries against a tile of keys, and the best of a row of scores without sorting it."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def index_scores(q, keys, weights, key_scale, base, visible, scores, first, last, count_keys, stride, wanted, QUERIES: tl.constexpr,
                 HEADS: tl.constexpr, WIDTH: tl.constexpr, TOGETHER: tl.constexpr, SCALED: tl.constexpr, KEYS: tl.constexpr,
                 STAGES: tl.constexpr):  # fmt: skip
    """I_ts = sum_h w_th ReLU(q_th . k_s), times the key's scale with SCALED, [last - first, stride].

    Column 0 is the first entry that a block's first query may see.
    Heads lie along the columns of the product, so that summing over them stays within a few threads. Blocks whose queries see no more than
    `wanted` entries are skipped, and so are tiles that no query of a block sees.
    """
    start = first + tl.program_id(1) * QUERIES
    final = tl.minimum(start + QUERIES, last) - 1
    low, high = tl.load(base + start), tl.load(base + final) + tl.load(visible + final)
    tokens = start + tl.arange(0, QUERIES)
    most = tl.max(tl.load(visible + tokens, tokens < last, 0), 0)
    columns = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    if (most > wanted) & (low + tl.program_id(0) * KEYS < high):
        deep, across = tl.arange(0, WIDTH), tl.arange(0, TOGETHER * HEADS)
        entry = low + columns
        k = tl.load(keys + entry[:, None] * WIDTH + deep[None, :], (entry < count_keys)[:, None], 0.0)
        if SCALED:
            scale = tl.load(key_scale + entry, entry < count_keys, 0.0)
        for some in tl.range(0, QUERIES, TOGETHER, num_stages=STAGES):
            line = (start + some).to(tl.int64) * HEADS + across
            seen = line < last * HEADS
            part = tl.load(q + line[:, None] * WIDTH + deep[None, :], seen[:, None], 0.0)
            product = tl.dot(k, tl.trans(part), input_precision="ieee")
            weighted = tl.maximum(product, 0.0) * tl.load(weights + line, seen, 0.0)[None, :]
            total = tl.sum(tl.reshape(weighted, [KEYS, TOGETHER, HEADS]), 2)
            if SCALED:
                total *= scale[:, None]
            rows = start + some + tl.arange(0, TOGETHER)
            place = (rows - first).to(tl.int64)[None, :] * stride + columns[:, None]
            tl.store(scores + place, total, (rows < last)[None, :] & (columns < stride)[:, None])


@triton.jit
def ordered(x):
    """Turn fp32 numbers into integers of the same order."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _number(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _quantile(share):
    """Return about the number that this share of a normal distribution exceeds. Source: Abramowitz and Stegun 26.2.22."""
    tail = tl.sqrt(-2 * tl.log(tl.minimum(share, 1 - share)))
    place = tail - (2.30753 + 0.27061 * tail) / (1 + 0.99229 * tail + 0.04481 * tail * tail)
    return tl.where(share < 0.5, place, -place)


@triton.jit
def find_threshold(score, key, inside, seen, wanted, slack):
    """Find an integer that at least `wanted` keys reach, at most `slack` more unless they tie there; returns it and how many.

    The first guess takes scores for normally distributed, the next ones interpolate between two bounds (the Illinois rule: a bound that
    stays counts half); should that not end soon, every other guess halves the integers between the bounds.
    """
    low, high = tl.min(tl.where(inside, key, 2147483647), 0).to(tl.int64), tl.max(key, 0).to(tl.int64) + 1
    mean = tl.sum(score, 0) / seen
    spread = tl.sqrt(tl.sum(tl.where(inside, (score - mean) * (score - mean), 0.0), 0) / seen)
    guess = ordered(mean + spread * _quantile(wanted / seen.to(tl.float32))).to(tl.int64)
    reached, turn, side = seen, seen * 0, seen * 0
    over, under = (seen - wanted).to(tl.float32) + 0.5, (0 - wanted).to(tl.float32) + 0.5
    while (reached - wanted > slack) & (high - low > 1):
        guess = tl.minimum(tl.maximum(guess, low + 1), high - 1)
        number = tl.sum((key >= guess.to(tl.int32)).to(tl.int32), 0)
        enough, error = number >= wanted, (number - wanted).to(tl.float32) + 0.5
        over, under = (
            tl.where(enough, error, tl.where(side == -1, over * 0.5, over)),
            tl.where(enough, tl.where(side == 1, under * 0.5, under), error),
        )
        low, high, reached = tl.where(enough, guess, low), tl.where(enough, high, guess), tl.where(enough, number, reached)
        side = tl.where(enough, 1, -1)
        turn += 1
        bottom, top = _number(low.to(tl.int32)), _number((high - 1).to(tl.int32))
        guess = ordered(bottom + (top - bottom) * (over / (over - under))).to(tl.int64)
        guess = tl.where((turn > 12) & (turn % 2 == 0), (low + high) >> 1, guess)
    return low.to(tl.int32), reached


@triton.jit
def select_rows(scores, base, visible, out, first, stride, wanted, QUERIES: tl.constexpr, BLOCK: tl.constexpr):
    """Write the numbers of the `wanted` highest scores of a row in order, ties to the lower number, -1 where there are fewer.

    Keys are integers in the order of the scores; hidden lanes hold one below all of them.
    """
    local = tl.program_id(0)
    row = first + local
    start, seen = tl.load(base + row), tl.load(visible + row).to(tl.int32)
    lanes = tl.arange(0, BLOCK)
    at = out + row.to(tl.int64) * wanted
    if seen <= wanted:
        for some in range(0, wanted, BLOCK):
            tl.store(at + some + lanes, tl.where(some + lanes < seen, some + lanes, -1).to(tl.int64), some + lanes < wanted)
    else:
        begin = start - tl.load(base + first + local // QUERIES * QUERIES)
        inside = lanes < seen
        score = tl.load(scores + local.to(tl.int64) * stride + begin + lanes, inside, 0.0) + 0.0
        key = tl.where(inside, ordered(score), -2147483648)
        threshold, reached = find_threshold(score, key, inside, seen, wanted, 0)
        equal = key == threshold
        ties = tl.sum(equal.to(tl.int32), 0)
        kept = (key > threshold) | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= ties - (reached - wanted)))
        place = tl.cumsum(kept.to(tl.int32), 0) - 1
        tl.store(at + place, lanes.to(tl.int64), kept)
