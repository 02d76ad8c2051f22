"""Scores of a block of queries against a tile of keys, and the best of a row of scores without sorting it."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def index_scores(q, keys, weights, base, visible, scores, first, last, count_keys, stride, wanted, QUERIES: tl.constexpr,
                 HEADS: tl.constexpr, WIDTH: tl.constexpr, TOGETHER: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """I_ts = sum_h w_th ReLU(q_th . k_s), [last - first, stride]; column 0 is the first entry that a block's first query may see.

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
        for some in tl.range(0, QUERIES, TOGETHER, num_stages=STAGES):
            line = (start + some).to(tl.int64) * HEADS + across
            seen = line < last * HEADS
            part = tl.load(q + line[:, None] * WIDTH + deep[None, :], seen[:, None], 0.0)
            product = tl.dot(k, tl.trans(part), input_precision="ieee")
            weighted = tl.maximum(product, 0.0) * tl.load(weights + line, seen, 0.0)[None, :]
            total = tl.sum(tl.reshape(weighted, [KEYS, TOGETHER, HEADS]), 2)
            rows = start + some + tl.arange(0, TOGETHER)
            place = (rows - first).to(tl.int64)[None, :] * stride + columns[:, None]
            tl.store(scores + place, total, (rows < last)[None, :] & (columns < stride)[:, None])


@triton.jit
def select_rows(scores, base, visible, out, first, stride, wanted, QUERIES: tl.constexpr, BLOCK: tl.constexpr):
    """Write the numbers of the `wanted` highest scores of a row in order, ties to the lower number, -1 where there are fewer.

    The threshold is found bit by bit on integers in the order of the floats: the largest that `wanted` scores reach.
    """
    local = tl.program_id(0)
    row = first + local
    start, seen = tl.load(base + row), tl.load(visible + row)
    lanes = tl.arange(0, BLOCK)
    at = out + row.to(tl.int64) * wanted
    if seen <= wanted:
        tl.store(at + lanes, tl.where(lanes < seen, lanes, -1).to(tl.int64), lanes < wanted)
    else:
        begin = start - tl.load(base + first + local // QUERIES * QUERIES)
        inside = lanes < seen
        bits = (tl.load(scores + local.to(tl.int64) * stride + begin + lanes, inside, 0.0) + 0.0).to(tl.int32, bitcast=True)
        key = (bits ^ ((bits >> 31) | -2147483648)).to(tl.uint32, bitcast=True)
        key = tl.where(inside, key, 0)
        threshold, reached, bit = tl.zeros([], tl.uint32), seen.to(tl.int32), 31
        while (bit >= 0) & (reached != wanted):
            higher = threshold | (tl.full([], 1, tl.uint32) << bit)
            number = tl.sum((key >= higher).to(tl.int32), 0)
            enough = number >= wanted
            threshold, reached = tl.where(enough, higher, threshold), tl.where(enough, number, reached)
            bit -= 1
        equal = inside & (key == threshold)
        spare = reached - wanted
        ties = tl.sum(equal.to(tl.int32), 0)
        kept = inside & ((key > threshold) | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= ties - spare)))
        place = tl.cumsum(kept.to(tl.int32), 0) - 1
        tl.store(at + place, lanes.to(tl.int64), kept)
