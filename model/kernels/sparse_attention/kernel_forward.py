"""Sparse attention in Triton, forward: one program a query and tile of heads, keys in rows, so that few heads still fill a product.

Scores are kept transposed, [keys, heads], and the output as [K, heads]. Logits are in units of log2 throughout: exp2 is what the
hardware has. The sink starts the running maximum and sum, so no row is ever empty.
"""

from __future__ import annotations

import triton
import triton.language as tl

NONE, RANGE, GATHERED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
"""Kinds of pool: no compressed entries, the first `count` entries from `base`, the rows listed for the query."""

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["k", "most"])
def prepare(indices, base, rows, count, places, k, most, block: tl.constexpr, inverse: tl.constexpr):
    """Turn one query's local entry numbers into rows of the pool, those there are first, and note each entry's place among them.

    Args:
        indices: [T, k] integer, -1 for none.
        base: [T] int64, the first row of the query's sample.
        rows: [T, k] int32 out, as far as `count`.
        count: [T] int32 out, how many are listed.
        places: [T, most] int16 out where `inverse`, already -1.
    """
    t = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, block)
    number = tl.load(indices + t * k + slot, mask=slot < k, other=-1).to(tl.int64)
    listed = number >= 0
    place = tl.cumsum(listed.to(tl.int32), 0) - 1
    tl.store(rows + t * k + place, (number + tl.load(base + t)).to(tl.int32), mask=listed)
    tl.store(count + t, tl.sum(listed.to(tl.int32), 0))
    if inverse:
        tl.store(places + t * most + number, place.to(tl.int16), mask=listed & (number < most))


@triton.jit
def window_rows(t, start, first, width: tl.constexpr, block: tl.constexpr):
    """Return the token rows in `block` slots of a query's window from slot `first` on, and which of them it sees."""
    slot = first + tl.arange(0, block)
    row = t - width + 1 + slot
    return row, (slot < width) & (row >= start)


@triton.jit
def pool_rows(rows, t, base, count, first, kind: tl.constexpr, k, block: tl.constexpr):
    """Return the pool rows in `block` slots of a query's list from slot `first` on, and which of them are there."""
    slot = first + tl.arange(0, block)
    seen = slot < count
    if kind == GATHERED:
        row = tl.load(rows + t * k + slot, mask=seen, other=-1)
        return row, row >= 0
    else:
        return base + slot, seen


@triton.jit
def load_rows(x, row, seen, dims, width: tl.constexpr):
    """Load rows of [*, width], zeros where not seen."""
    return tl.load(x + row.to(tl.int64)[:, None] * width + dims[None, :], mask=seen[:, None], other=0.0)


@triton.jit
def _attend(key, seen, qt, m, l, acc, scale, precision: tl.constexpr):
    """Fold one tile of keys [keys, K] into the running maximum, sum [heads] and output [K, heads]."""
    scores = tl.dot(key, qt, input_precision=precision) * scale
    scores = tl.where(seen[:, None], scores, float("-inf"))
    top = tl.maximum(m, tl.max(scores, 0))
    p = tl.exp2(scores - top[None, :])
    shrink = tl.exp2(m - top)
    l = l * shrink + tl.sum(p, 0)
    acc = tl.dot(tl.trans(key), p.to(key.dtype), acc * shrink[None, :], input_precision=precision)
    return top, l, acc


@triton.jit(do_not_specialize=["k"])
def forward(
    q, kv, ckv, cu, sample, rows, base, count, sink, out, lse, scale,
    heads: tl.constexpr, width: tl.constexpr, window: tl.constexpr, k, kind: tl.constexpr,
    head_block: tl.constexpr, block: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """Attend from one query with `head_block` heads; write the output and the log2 of the sum of its exponentials.

    Args:
        q, out: [T, H, K]. kv: [T, K]. ckv: [C, K]. sink: [H]. lse: [T, H] fp32 out, log2.
        cu: [N + 1], sample: [T], where each sample starts and which one a token is of.
        rows: [T, k] int32 (GATHERED). base: [T], count: [T] (RANGE; GATHERED needs only count).
    """
    t = tl.num_programs(0) - 1 - tl.program_id(0)  # late queries see most: they start first
    head = tl.program_id(1) * head_block + tl.arange(0, head_block)
    dims = tl.arange(0, width)
    place = (t.to(tl.int64) * heads + head)[:, None] * width + dims[None, :]
    qt = tl.trans(tl.load(q + place, mask=head[:, None] < heads, other=0.0))
    m = tl.load(sink + head, mask=head < heads, other=0.0).to(tl.float32) * LOG2E
    l = tl.full([head_block], 1.0, tl.float32)
    acc = tl.zeros([width, head_block], tl.float32)
    start = tl.load(cu + tl.load(sample + t)).to(tl.int32)
    unseen = tl.maximum(start - (t - window + 1), 0)
    for first in range(unseen // block * block, window, block):
        row, seen = window_rows(t, start, first, window, block)
        m, l, acc = _attend(load_rows(kv, row, seen, dims, width), seen, qt, m, l, acc, scale, precision)
    if kind != NONE:
        low, entries = tl.load(base + t).to(tl.int32), tl.load(count + t).to(tl.int32)
        for first in range(0, entries, block):
            row, seen = pool_rows(rows, t.to(tl.int64), low, entries, first, kind, k, block)
            m, l, acc = _attend(load_rows(ckv, row, seen, dims, width), seen, qt, m, l, acc, scale, precision)
    tl.store(lse + t * heads + head, m + tl.log2(l), mask=head < heads)
    tl.store(out + place, tl.trans(acc / l[None, :]).to(out.dtype.element_ty), mask=head[:, None] < heads)
