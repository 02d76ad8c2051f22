"""Sparse attention in Triton, backward, as four kinds of matrix product that never wait for each other's accumulators.

`probabilities` makes P and dS of every (query, slot, head) once and stores them; slots are the window's tokens, oldest first, then the
pool's. `query_gradient` multiplies dS by the keys. The keys' gradient is owned by blocks of keys that loop over the queries that see them
(`key_gradient`), or scattered by query with atomic additions (`scatter_gradient`) where most queries see few of the keys. A long row is
worked off in stretches of queries: `origin` is the first one whose P and dS are there.
"""

from __future__ import annotations

import triton
import triton.language as tl

from model.kernels.sparse_attention.kernel_forward import GATHERED, NONE, load_rows, pool_rows, window_rows


@triton.jit
def _weigh(key, seen, qt, dot, lse, delta, scale, log2_scale, precision: tl.constexpr):
    """Return P and dS * scale of one tile of keys, [keys, heads] fp32."""
    scores = tl.dot(key, qt, input_precision=precision) * log2_scale
    p = tl.where(seen[:, None], tl.exp2(scores - lse[None, :]), 0.0)
    dp = tl.dot(key, dot, input_precision=precision)
    return p, p * (dp - delta[None, :]) * scale


@triton.jit(do_not_specialize=["rows"])
def delta(out, grad, delta, rows, width: tl.constexpr, block: tl.constexpr):
    """Write the sum of out * grad of `block` rows [K], fp32: delta [rows], out and grad [rows, K]."""
    row = tl.program_id(0) * block + tl.arange(0, block)
    place = row.to(tl.int64)[:, None] * width + tl.arange(0, width)[None, :]
    there = row[:, None] < rows
    o = tl.load(out + place, mask=there, other=0.0).to(tl.float32)
    tl.store(delta + row, tl.sum(o * tl.load(grad + place, mask=there, other=0.0).to(tl.float32), 1), mask=row < rows)


@triton.jit(do_not_specialize=["origin", "k", "slots"])
def probabilities(
    q, kv, ckv, cu, sample, rows, base, count, grad, lse, delta, p_out, ds_out, scale, log2_scale, origin,
    heads: tl.constexpr, width: tl.constexpr, window: tl.constexpr, k, kind: tl.constexpr, slots,
    head_block: tl.constexpr, block: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """Write P and dS of one query and `head_block` heads.

    Args:
        q, grad: [T, H, K]; kv, ckv, cu, sample, rows, base, count as in `forward`. lse, delta: [T, H].
        p_out, ds_out: [*, slots, H] out, from query `origin` on; slots that the query does not see are left as they are. dS is scaled
            by 1 / sqrt(K).
    """
    t = origin + tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1) * head_block + tl.arange(0, head_block)
    there = head < heads
    dims = tl.arange(0, width)
    place = (t.to(tl.int64) * heads + head)[:, None] * width + dims[None, :]
    dot = tl.trans(tl.load(grad + place, mask=there[:, None], other=0.0))
    qt = tl.trans(tl.load(q + place, mask=there[:, None], other=0.0))
    d = tl.load(delta + t * heads + head, mask=there, other=0.0)
    norm = tl.load(lse + t * heads + head, mask=there, other=0.0)
    start = tl.load(cu + tl.load(sample + t)).to(tl.int32)
    unseen = tl.maximum(start - (t - window + 1), 0)
    place = ((t - origin).to(tl.int64) * slots + tl.arange(0, block))[:, None] * heads + head[None, :]
    for first in range(unseen // block * block, window, block):
        row, seen = window_rows(t, start, first, window, block)
        p, ds = _weigh(load_rows(kv, row, seen, dims, width), seen, qt, dot, norm, d, scale, log2_scale, precision)
        mask = seen[:, None] & there[None, :]
        tl.store(p_out + place + first * heads, p.to(p_out.dtype.element_ty), mask=mask)
        tl.store(ds_out + place + first * heads, ds.to(ds_out.dtype.element_ty), mask=mask)
    if kind != NONE:
        low, entries = tl.load(base + t).to(tl.int32), tl.load(count + t).to(tl.int32)
        for first in range(0, entries, block):
            row, seen = pool_rows(rows, t.to(tl.int64), low, entries, first, kind, k, block)
            p, ds = _weigh(load_rows(ckv, row, seen, dims, width), seen, qt, dot, norm, d, scale, log2_scale, precision)
            mask = seen[:, None] & there[None, :]
            tl.store(p_out + place + (window + first) * heads, p.to(p_out.dtype.element_ty), mask=mask)
            tl.store(ds_out + place + (window + first) * heads, ds.to(ds_out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["origin", "k", "slots"])
def query_gradient(
    kv, ckv, cu, sample, rows, base, count, ds, dq, origin,
    heads: tl.constexpr, width: tl.constexpr, window: tl.constexpr, k, kind: tl.constexpr, slots,
    head_block: tl.constexpr, block: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """Write dQ [T, H, K] of one query and `head_block` heads: dS [*, slots, H], from query `origin` on, times the keys."""
    t = origin + tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1) * head_block + tl.arange(0, head_block)
    there = head < heads
    dims = tl.arange(0, width)
    acc = tl.zeros([head_block, width], tl.float32)
    start = tl.load(cu + tl.load(sample + t)).to(tl.int32)
    unseen = tl.maximum(start - (t - window + 1), 0)
    place = ((t - origin).to(tl.int64) * slots + tl.arange(0, block))[:, None] * heads + head[None, :]
    for first in range(unseen // block * block, window, block):
        row, seen = window_rows(t, start, first, window, block)
        w = tl.load(ds + place + first * heads, mask=seen[:, None] & there[None, :], other=0.0)
        acc = tl.dot(tl.trans(w), load_rows(kv, row, seen, dims, width), acc, input_precision=precision)
    if kind != NONE:
        low, entries = tl.load(base + t).to(tl.int32), tl.load(count + t).to(tl.int32)
        for first in range(0, entries, block):
            row, seen = pool_rows(rows, t.to(tl.int64), low, entries, first, kind, k, block)
            w = tl.load(ds + place + (window + first) * heads, mask=seen[:, None] & there[None, :], other=0.0)
            acc = tl.dot(tl.trans(w), load_rows(ckv, row, seen, dims, width), acc, input_precision=precision)
    place = (t.to(tl.int64) * heads + head)[:, None] * width + dims[None, :]
    tl.store(dq + place, acc.to(dq.dtype.element_ty), mask=there[:, None])


@triton.jit
def _slots_of_keys(places, query, local, seen, most, window: tl.constexpr, kind: tl.constexpr):
    """Return the slot of each key [n, 1] in the row of each query [1, m], and which are there of those that may be seen."""
    if kind == NONE:
        return local - query + window - 1, seen
    elif kind == GATHERED:
        slot = tl.load(places + query.to(tl.int64) * most + local, mask=seen, other=-1).to(tl.int32)
        return window + slot, seen & (slot >= 0)
    else:
        return window + local + query * 0, seen


@triton.jit(do_not_specialize=["origin", "number", "most", "slots"])
def key_gradient(
    q, grad, p, ds, places, begin, end, local, dkeys, origin, number, most,
    heads: tl.constexpr, width: tl.constexpr, window: tl.constexpr, kind: tl.constexpr, slots,
    block: tl.constexpr, row_block: tl.constexpr, width_block: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """Write P^T grad + dS^T Q of `block` keys and `width_block` channels, over one part of the queries that see them.

    Args:
        q, grad: [T, H, K]; p, ds: [*, slots, H], from query `origin` on.
        places: [T, most] int16, the slot of each entry (GATHERED).
        begin, end: [number] int32, the queries that may see a key, non-decreasing; local: [number] int32, its number in its sample, or the
            token that it is (NONE).
        dkeys: [parts, number, K] out. number: keys. Kind NONE stands for the window.
    """
    first = tl.program_id(0) * block
    channel = tl.program_id(1) * width_block + tl.arange(0, width_block)
    low = tl.load(begin + first)
    high = tl.load(end + tl.minimum(first + block, number) - 1)
    part = (high - low + tl.num_programs(2) - 1) // tl.num_programs(2)
    low = low + tl.program_id(2) * part
    high = tl.minimum(low + part, high)
    key = (first + tl.arange(0, block))[:, None]
    key_begin = tl.load(begin + key, mask=key < number, other=0)
    key_end = tl.load(end + key, mask=key < number, other=0)
    key_local = tl.load(local + key, mask=key < number, other=0)
    acc = tl.zeros([block, width_block], tl.float32)
    for r0 in range(low * heads, high * heads, row_block):
        r = r0 + tl.arange(0, row_block)
        if heads % row_block == 0:
            query, head = tl.full([1, 1], r0 // heads, tl.int32), (r0 % heads + tl.arange(0, row_block))[None, :]
        else:
            query, head = (r // heads)[None, :], (r % heads)[None, :]
        seen = (query >= key_begin) & (query < tl.minimum(key_end, high))
        slot, seen = _slots_of_keys(places, query, key_local, seen, most, window, kind)
        place = ((query - origin).to(tl.int64) * slots + slot) * heads + head
        seen = seen & (head >= 0)
        rows = r.to(tl.int64)[:, None] * width + channel[None, :]
        there = r[:, None] < high * heads
        acc = tl.dot(tl.load(p + place, mask=seen, other=0.0), tl.load(grad + rows, mask=there, other=0.0), acc, input_precision=precision)
        acc = tl.dot(tl.load(ds + place, mask=seen, other=0.0), tl.load(q + rows, mask=there, other=0.0), acc, input_precision=precision)
    target = (tl.program_id(2).to(tl.int64) * number + key) * width + channel[None, :]
    tl.store(dkeys + target, acc.to(dkeys.dtype.element_ty), mask=key < number)


@triton.jit(do_not_specialize=["origin", "k", "slots"])
def scatter_gradient(
    q, grad, p, ds, rows, count, dkeys, origin,
    heads: tl.constexpr, width: tl.constexpr, window: tl.constexpr, k, slots,
    head_block: tl.constexpr, block: tl.constexpr, width_block: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """Add P^T grad + dS^T Q of one query, its listed entries and `width_block` channels to dkeys [C, K] fp32, in no fixed order."""
    t = origin + tl.num_programs(0) - 1 - tl.program_id(0)
    channel = tl.program_id(1) * width_block + tl.arange(0, width_block)
    head = tl.program_id(2) * head_block + tl.arange(0, head_block)
    there = head < heads
    place = (t.to(tl.int64) * heads + head)[:, None] * width + channel[None, :]
    do = tl.load(grad + place, mask=there[:, None], other=0.0)
    query = tl.load(q + place, mask=there[:, None], other=0.0)
    entries = tl.load(count + t)
    place = ((t - origin).to(tl.int64) * slots + window + tl.arange(0, block))[:, None] * heads + head[None, :]
    for first in range(0, entries, block):
        row, seen = pool_rows(rows, t.to(tl.int64), 0, entries, first, GATHERED, k, block)
        mask = seen[:, None] & there[None, :]
        acc = tl.dot(tl.load(p + place + first * heads, mask=mask, other=0.0), do, input_precision=precision)
        acc = tl.dot(tl.load(ds + place + first * heads, mask=mask, other=0.0), query, acc, input_precision=precision)
        target = row.to(tl.int64)[:, None] * width + channel[None, :]
        tl.atomic_add(dkeys + target, acc, mask=seen[:, None], sem="relaxed")
