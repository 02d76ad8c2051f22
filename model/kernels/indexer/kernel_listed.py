"""Scores of single queries against all entries that they see, and the best of many scores in rounds; nothing waits for the host."""

from __future__ import annotations

import triton
import triton.language as tl

from model.kernels.indexer.kernel import find_threshold, ordered


@triton.jit(do_not_specialize=["wanted"])
def score_entries(
    q, keys, weights, count, scores, peaks, row_stride, entry_stride, entries, wanted,
    heads: tl.constexpr, width: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr, TILES: tl.constexpr,
    GROUP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """I_bs = sum_h w_bh ReLU(q_bh . k_bs), [B, entries] fp32, for s < count; nothing where all that a query sees are wanted.

    Args:
        q: [B, H, K]. keys: [B, *, K], strides of its first two dimensions given. weights: [B, H]. count: [B] int32.
        peaks: [B, entries / GROUP rounded up] fp32 out, the highest score of GROUP entries each; GROUP 0 for none.
    """
    row = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * (KEYS * TILES)
    seen = tl.load(count + row).to(tl.int32)
    if (seen > wanted) & (first < seen):
        head, deep = tl.arange(0, HEADS), tl.arange(0, WIDTH)
        there = (head < heads)[:, None] & (deep < width)[None, :]
        part = tl.trans(tl.load(q + (row * heads + head)[:, None] * width + deep[None, :], there, 0.0))
        w = tl.load(weights + row * heads + head, head < heads, 0.0).to(tl.float32)
        for tile in tl.range(0, TILES, num_stages=STAGES):
            entry = first + tile * KEYS + tl.arange(0, KEYS)
            place = keys + row * row_stride + entry.to(tl.int64)[:, None] * entry_stride + deep[None, :]
            k = tl.load(place, (entry < seen)[:, None] & (deep < width)[None, :], 0.0)
            product = tl.dot(k, part, input_precision="ieee")
            total = tl.sum(tl.maximum(product, 0.0) * w[None, :], 1)
            tl.store(scores + row * entries + entry, total, entry < seen)
            if GROUP:
                group = (first + tile * KEYS) // GROUP + tl.arange(0, KEYS // GROUP)
                peak = tl.max(tl.reshape(tl.where(entry < seen, total, float("-inf")), [KEYS // GROUP, GROUP]), 1)
                tl.store(peaks + row * tl.cdiv(entries, GROUP) + group, peak, group * GROUP < seen)


@triton.jit(do_not_specialize=["wanted"])
def bound_scores(peaks, count, bound, groups, wanted, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """Write a number, as `ordered` makes it, that at least `wanted` of one query's entries reach and not many more: bound [B] int32.

    At least `wanted` groups have a peak that high, each of another entry. Where fewer groups are there, it is below all scores.
    """
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    inside = (lanes < groups) & (lanes * GROUP < tl.load(count + row).to(tl.int32))
    number = tl.sum(inside.to(tl.int32), 0)
    lowest = tl.full([], -2147483648, tl.int32)
    if number > wanted:
        peak = tl.load(peaks + row * groups + lanes, inside, 0.0) + 0.0
        key = tl.where(inside, ordered(peak), -2147483648)
        lowest, _ = find_threshold(peak, key, inside, number, wanted, wanted // 16)
    tl.store(bound + row, lowest)


@triton.jit(do_not_specialize=["wanted"])
def keep_best(
    scores, numbers, count, bound, best_scores, best, reached, entries, wanted,
    FIRST: tl.constexpr, LAST: tl.constexpr, BOUNDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Keep the `wanted` highest of BLOCK scores in their order, ties to the earlier, -1 where there are fewer.

    Args:
        scores: [B, entries] fp32. numbers: [B, entries] int32, the entry that a score is of, -1 for none; not read in the first round,
            where the first `count` [B] int32 are all there, with BOUNDED as far as they reach `bound` [B] int32.
        best_scores, best: [B, blocks, wanted] out, scores (unless LAST) and numbers. reached: [B] int32 out, how many (LAST).
    """
    row, block = tl.program_id(1).to(tl.int64), tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    place = block * BLOCK + lanes
    if FIRST:
        number = place
        inside = place < tl.load(count + row)
    else:
        number = tl.load(numbers + row * entries + place, place < entries, -1)
        inside = number >= 0
    score = tl.load(scores + row * entries + place, inside, 0.0) + 0.0
    if BOUNDED:
        inside = inside & (ordered(score) >= tl.load(bound + row))
    seen = tl.sum(inside.to(tl.int32), 0)
    kept = inside
    if seen > wanted:
        key = tl.where(inside, ordered(score), -2147483648)
        threshold, enough = find_threshold(score, key, inside, seen, wanted, 0)
        kept = inside & (key >= threshold)
        if enough > wanted:
            equal = inside & (key == threshold)
            spare = tl.sum(equal.to(tl.int32), 0) - (enough - wanted)
            kept = kept & ((key > threshold) | (tl.cumsum(equal.to(tl.int32), 0) <= spare))
    at = (row * tl.num_programs(0) + block) * wanted
    slot = at + tl.cumsum(kept.to(tl.int32), 0) - 1
    tl.store(best + slot, number, kept)
    if not LAST:
        tl.store(best_scores + slot, score, kept)
    found = tl.minimum(seen, wanted)
    for some in range(0, wanted, BLOCK):
        tl.store(best + at + some + lanes, tl.full([BLOCK], -1, tl.int32), (some + lanes >= found) & (some + lanes < wanted))
    if LAST:
        tl.store(reached + row, found)
