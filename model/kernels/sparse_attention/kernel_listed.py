"""Attention of single queries to listed rows of a cache, in parts of a list that are put together afterwards.

Values are the first channels of keys. Channels beyond them, where there are any, are a second product into the same scores, so that neither
needs a power of two of both. Logits are in units of log2; a missing sink is one far below every score.
"""

from __future__ import annotations

import triton
import triton.language as tl

from model.kernels.sparse_attention.kernel_forward import LOG2E

NOTHING = tl.constexpr(-1e30)
"""Logit of a sink that is not there; finite, so that an empty list has a softmax."""


@triton.jit
def _load_sink(sink, head, heads, HAS_SINK: tl.constexpr):
    """Load the sink's logits, log2."""
    if HAS_SINK:
        return tl.load(sink + head, head < heads, 0.0).to(tl.float32) * LOG2E
    else:
        return tl.zeros(head.shape, tl.float32) + NOTHING


@triton.jit
def _fold(key, extra, seen, qt, qt_extra, m, l, acc, scale, REST: tl.constexpr, precision: tl.constexpr):
    """Fold one tile of keys [keys, VALUES] and their other channels into the running maximum, sum [heads] and output [VALUES, heads]."""
    scores = tl.dot(key, qt, input_precision=precision)
    if REST:
        scores = tl.dot(extra, qt_extra, scores, input_precision=precision)
    scores = tl.where(seen[:, None], scores * scale, float("-inf"))
    top = tl.maximum(m, tl.max(scores, 0))
    p = tl.exp2(scores - top[None, :])
    shrink = tl.exp2(m - top)
    acc = tl.dot(tl.trans(key), p.to(key.dtype), acc * shrink[None, :], input_precision=precision)
    return top, l * shrink + tl.sum(p, 0), acc


@triton.jit(do_not_specialize=["k", "span"])
def attend_part(
    q, keys, rows, count, sink, out, lse, scale, k, span,
    heads: tl.constexpr, width: tl.constexpr, VALUES: tl.constexpr, REST: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr, WHOLE: tl.constexpr, HAS_SINK: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """Attend from one query with HEADS heads to `span` rows of its list.

    Args:
        q: [B, H, width], width = VALUES + REST. keys: [N, width]. rows: [B, k] int32. count: [B] int32. sink: [H].
        out: [B, parts, H, VALUES] out, the mean over the part, sink included where WHOLE (parts = 1); not written where a part is empty.
        lse: [B, parts, H] fp32 out, log2 of the sum of exponentials; not where WHOLE.
    """
    b, part = tl.program_id(0).to(tl.int64), tl.program_id(2)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    low = part * span
    high = tl.minimum(low + span, tl.minimum(tl.load(count + b).to(tl.int32), k))
    if WHOLE | (low < high):
        dims = tl.arange(0, VALUES)
        line = (b * heads + head)[:, None] * width
        there = (head < heads)[:, None]
        qt = tl.trans(tl.load(q + line + dims[None, :], there, 0.0))
        qt_extra = qt
        if REST:
            qt_extra = tl.trans(tl.load(q + line + VALUES + tl.arange(0, REST)[None, :], there, 0.0))
        m = _load_sink(sink, head, heads, HAS_SINK & WHOLE)
        l = tl.full([HEADS], 1.0, tl.float32) if WHOLE else tl.zeros([HEADS], tl.float32)
        acc = tl.zeros([VALUES, HEADS], tl.float32)
        for first in tl.range(low, high, BLOCK, num_stages=STAGES):
            slot = first + tl.arange(0, BLOCK)
            seen = slot < high
            row = tl.load(rows + b * k + slot, seen, 0).to(tl.int64)[:, None] * width
            key = tl.load(keys + row + dims[None, :], seen[:, None], 0.0)
            extra = key
            if REST:
                extra = tl.load(keys + row + VALUES + tl.arange(0, REST)[None, :], seen[:, None], 0.0)
            m, l, acc = _fold(key, extra, seen, qt, qt_extra, m, l, acc, scale, REST, precision)
        at = (b * tl.num_programs(2) + part) * heads + head
        if not WHOLE:
            tl.store(lse + at, m + tl.log2(l), head < heads)
        result = tl.trans(acc / l[None, :])
        tl.store(out + at[:, None] * VALUES + dims[None, :], result.to(out.dtype.element_ty), there)


@triton.jit(do_not_specialize=["k", "span", "parts"])
def combine(
    partial, lse, count, sink, out, k, span, parts,
    heads: tl.constexpr, VALUES: tl.constexpr, PARTS: tl.constexpr, CHANNELS: tl.constexpr, HAS_SINK: tl.constexpr,
):  # fmt: skip
    """Put the parts of one query's head together, CHANNELS channels: out [B, H, VALUES] from partial [B, parts, H, VALUES] and lse."""
    b, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    channel = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    part = tl.arange(0, PARTS)
    there = (part < parts) & (part * span < tl.minimum(tl.load(count + b).to(tl.int32), k))
    at = (b * parts + part) * heads + head
    logs = tl.load(lse + at, there, float("-inf"))
    own = tl.max(_load_sink(sink, head + tl.arange(0, 1), heads, HAS_SINK), 0)
    top = tl.maximum(tl.max(logs, 0), own)
    share = tl.exp2(logs - top)
    share = share / (tl.sum(share, 0) + tl.exp2(own - top))
    x = tl.load(partial + at[:, None] * VALUES + channel[None, :], there[:, None], 0.0).to(tl.float32)
    result = tl.sum(x * share[:, None], 0)
    tl.store(out + (b * heads + head) * VALUES + channel, result.to(out.dtype.element_ty))
