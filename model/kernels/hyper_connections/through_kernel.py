"""Mixing out of one sub-layer and into the next at once, four residual streams: what lies between is not written to be read again.

X are the streams before, f the sub-layer's output, X'_k = post_k f + sum_j comb_jk X_j the streams after. Arithmetic in fp32; fn goes into
products in the streams' dtype, [24, 4 D], or with LOW as two such numbers, whose sum has (almost) all of its bits, [48, 4 D].
"""

from __future__ import annotations

import triton
import triton.language as tl

from model.kernels.hyper_connections.kernel import ROWS


@triton.jit
def _four(at, seen):
    """Load four neighbours for every token."""
    return tl.load(at, seen, 0.0), tl.load(at + 1, seen, 0.0), tl.load(at + 2, seen, 0.0), tl.load(at + 3, seen, 0.0)


@triton.jit
def _four_wide(at, width, mask):
    """Load the same columns of the four streams."""
    return tl.load(at, mask, 0.0), tl.load(at + width, mask, 0.0), tl.load(at + 2 * width, mask, 0.0), tl.load(at + 3 * width, mask, 0.0)


@triton.jit
def _weighted(a, b, c, d, x0, x1, x2, x3):
    """a x0 + b x1 + c x2 + d x3 of weights [TOKENS] and tiles [TOKENS, BLOCK]."""
    total = a[:, None] * x0.to(tl.float32) + b[:, None] * x1.to(tl.float32)
    return total + c[:, None] * x2.to(tl.float32) + d[:, None] * x3.to(tl.float32)


@triton.jit
def _both(values, lines, dtype: tl.constexpr):
    """Split `values` [64, .] into numbers of a narrower dtype: the second half has what the first lacks."""
    near = values.to(dtype)
    return tl.where(lines < ROWS, near, (values - near.to(tl.float32)).to(dtype))


@triton.jit
def _project(x, fn_at, known, sums, square):
    """Add fn times the tile, [64, TOKENS] and its squares to what came before; rows 32 to 63 are those of fn's lower bits."""
    sums = tl.dot(tl.load(fn_at, known, 0.0), tl.trans(x), sums, input_precision="ieee")
    x = x.to(tl.float32)
    return sums, square + tl.sum(x * x, 1)


@triton.jit
def expand_project(output, streams, post, comb, fn, out, raw, squares, tokens, width, part, LOW: tl.constexpr, TOKENS: tl.constexpr,
                   BLOCK: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Write X' [T, 4, D] and, of the slice of D columns of this program, raw [S, T, 32] and squares [S, T] as `kernel.project` does."""
    slice_ = tl.program_id(1)
    rows = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    seen = rows < tokens
    line = tl.arange(0, 2 * ROWS) % ROWS
    second = tl.arange(0, 2 * ROWS) // ROWS
    real = (line < 24) & (second < (2 if LOW else 1))
    wide_rows = rows.to(tl.int64)[:, None]
    p0, p1, p2, p3 = _four(post + rows * 4, seen)
    c00, c01, c02, c03 = _four(comb + rows * 16, seen)
    c10, c11, c12, c13 = _four(comb + rows * 16 + 4, seen)
    c20, c21, c22, c23 = _four(comb + rows * 16 + 8, seen)
    c30, c31, c32, c33 = _four(comb + rows * 16 + 12, seen)
    sums = tl.zeros([2 * ROWS, TOKENS], tl.float32)
    square = tl.zeros([TOKENS], tl.float32)
    first = slice_ * part
    for start in tl.range(first, tl.minimum(first + part, width), BLOCK, num_stages=STAGES):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < width
        mask = seen[:, None] & inside[None, :]
        place = wide_rows * (4 * width) + columns[None, :]
        f = tl.load(output + wide_rows * width + columns[None, :], mask, 0.0).to(tl.float32)
        x0, x1, x2, x3 = _four_wide(streams + place, width, mask)
        fn_at, to = fn + (24 * second + line)[:, None] * (4 * width) + columns[None, :], out + place
        known = real[:, None] & inside[None, :]
        y = (p0[:, None] * f + _weighted(c00, c10, c20, c30, x0, x1, x2, x3)).to(out.dtype.element_ty)
        tl.store(to, y, mask)
        sums, square = _project(y, fn_at, known, sums, square)
        y = (p1[:, None] * f + _weighted(c01, c11, c21, c31, x0, x1, x2, x3)).to(out.dtype.element_ty)
        tl.store(to + width, y, mask)
        sums, square = _project(y, fn_at + width, known, sums, square)
        y = (p2[:, None] * f + _weighted(c02, c12, c22, c32, x0, x1, x2, x3)).to(out.dtype.element_ty)
        tl.store(to + 2 * width, y, mask)
        sums, square = _project(y, fn_at + 2 * width, known, sums, square)
        y = (p3[:, None] * f + _weighted(c03, c13, c23, c33, x0, x1, x2, x3)).to(out.dtype.element_ty)
        tl.store(to + 3 * width, y, mask)
        sums, square = _project(y, fn_at + 3 * width, known, sums, square)
    place = slice_.to(tl.int64) * tokens + rows
    total = tl.sum(tl.reshape(sums, [2, ROWS, TOKENS]), 0)
    tl.store(raw + place[None, :] * ROWS + tl.arange(0, ROWS)[:, None], total, seen[None, :])
    tl.store(squares + place, square, seen)


@triton.jit
def _fn(fn, stream, width, columns, inside, LOW: tl.constexpr):
    """Load fn's columns of one stream twice, [BLOCK, 64], and beside it its lower bits, once and then zeros."""
    lines = tl.arange(0, 2 * ROWS)[None, :]
    at = fn + (stream * width + columns)[:, None]
    high = tl.load(at + lines % ROWS * (4 * width), (lines % ROWS < 24) & inside[:, None], 0.0)
    low = tl.load(at + (24 + lines) * (4 * width), (lines < (24 if LOW else 0)) & inside[:, None], 0.0)
    return high, low


@triton.jit
def _product(weights, high, low, LOW: tl.constexpr):
    """Return draw fn_k [TOKENS, BLOCK]; made transposed, so that the compiler lays out what follows like the loads, not like a product."""
    dy = tl.dot(high, weights, input_precision="ieee")
    if LOW:
        dy = tl.dot(low, weights, dy, input_precision="ieee")
    return tl.trans(dy)


@triton.jit
def through_backward(output, streams, post, comb, grad, through, draw, dsquare, pre, fn, doutput, dstreams, parts, tokens, width, group,
                     LOW: tl.constexpr, THROUGH: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Gradients of f and X, from that of the collapsed input d, `grad` [T, D], and of X' from its later readers, `through` [T, 4, D].

    dX'_k = pre_k d + draw fn_k + dsquare X'_k + through_k stays in registers, X'_k is computed again. One program takes a block of
    columns of all streams over a group of tokens. It writes df = sum_k post_k dX'_k, dX_j = sum_k comb_jk dX'_k, and its columns' share
    of dpost_k = <f, dX'_k> and of dcomb_jk = <X_j, dX'_k>, parts [S, 20, T].
    """
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    lines = tl.arange(0, 2 * ROWS)[:, None]
    dtype: tl.constexpr = streams.dtype.element_ty
    high0, low0 = _fn(fn, 0, width, columns, inside, LOW)
    high1, low1 = _fn(fn, 1, width, columns, inside, LOW)
    high2, low2 = _fn(fn, 2, width, columns, inside, LOW)
    high3, low3 = _fn(fn, 3, width, columns, inside, LOW)
    square = (tl.arange(0, 2)[:, None] * 2 + tl.arange(0, 2)[None, :])[None, :, :]
    first = tl.program_id(1) * group
    for start in tl.range(first, tl.minimum(first + group, tokens), TOKENS, num_stages=1):
        rows = start + tl.arange(0, TOKENS)
        seen = rows < tokens
        mask = seen[:, None] & inside[None, :]
        wide_rows = rows.to(tl.int64)[:, None]
        place, narrow = wide_rows * (4 * width) + columns[None, :], wide_rows * width + columns[None, :]
        x0, x1, x2, x3 = _four_wide(streams + place, width, mask)
        f, d = tl.load(output + narrow, mask, 0.0), tl.load(grad + narrow, mask, 0.0)
        weights = tl.load(draw + rows[None, :] * ROWS + lines % ROWS, seen[None, :] & (lines % ROWS < 24), 0.0)
        weights = _both(weights, lines, dtype)
        along = tl.load(dsquare + rows, seen, 0.0)
        df = tl.zeros([TOKENS, BLOCK], tl.float32)
        dx0, dx1 = tl.zeros([TOKENS, BLOCK], tl.float32), tl.zeros([TOKENS, BLOCK], tl.float32)
        dx2, dx3 = tl.zeros([TOKENS, BLOCK], tl.float32), tl.zeros([TOKENS, BLOCK], tl.float32)
        to = parts + tl.program_id(0).to(tl.int64) * (20 * tokens) + rows
        for k in tl.static_range(4):
            p = tl.load(post + rows * 4 + k, seen, 0.0)
            c0, c1 = tl.load(comb + rows * 16 + k, seen, 0.0), tl.load(comb + rows * 16 + 4 + k, seen, 0.0)
            c2, c3 = tl.load(comb + rows * 16 + 8 + k, seen, 0.0), tl.load(comb + rows * 16 + 12 + k, seen, 0.0)
            y = p[:, None] * f.to(tl.float32) + _weighted(c0, c1, c2, c3, x0, x1, x2, x3)
            high = high0 if k == 0 else high1 if k == 1 else high2 if k == 2 else high3
            low = low0 if k == 0 else low1 if k == 1 else low2 if k == 2 else low3
            dy = _product(weights, high, low, LOW) + along[:, None] * y
            dy += tl.load(pre + rows * 4 + k, seen, 0.0)[:, None] * d.to(tl.float32)
            if THROUGH:
                dy += tl.load(through + place + k * width, mask, 0.0).to(tl.float32)
            df += p[:, None] * dy
            dx0 += c0[:, None] * dy
            dx1 += c1[:, None] * dy
            dx2 += c2[:, None] * dy
            dx3 += c3[:, None] * dy
            tl.store(to + k * tokens, tl.sum(f.to(tl.float32) * dy, 1), seen)
            even = tl.join(x0.to(tl.float32) * dy, x2.to(tl.float32) * dy)
            odd = tl.join(x1.to(tl.float32) * dy, x3.to(tl.float32) * dy)
            tl.store(to[:, None, None] + (4 + k + 4 * square) * tokens, tl.sum(tl.join(even, odd), 1), seen[:, None, None])
        tl.store(doutput + narrow, df.to(dtype), mask)
        tl.store(dstreams + place, dx0.to(dtype), mask)
        tl.store(dstreams + place + width, dx1.to(dtype), mask)
        tl.store(dstreams + place + 2 * width, dx2.to(dtype), mask)
        tl.store(dstreams + place + 3 * width, dx3.to(dtype), mask)


@triton.jit
def weights_backward(streams, draw, dfn, tokens, width, group, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
                     STAGES: tl.constexpr):  # fmt: skip
    """draw^T X over a group of tokens, the streams X [T, K] as one row a token: dfn [G, 32, K]."""
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    lines = tl.arange(0, ROWS)[None, :]
    total = tl.zeros([BLOCK, ROWS], tl.float32)
    first = tl.program_id(1) * group
    for start in tl.range(first, tl.minimum(first + group, tokens), TOKENS, num_stages=STAGES):
        rows = start + tl.arange(0, TOKENS)
        seen = rows[:, None] < tokens
        x = tl.load(streams + rows.to(tl.int64)[:, None] * width + columns[None, :], seen & inside[None, :], 0.0)
        weights = tl.load(draw + rows[:, None] * ROWS + lines, seen & (lines < 24), 0.0)
        total = tl.dot(tl.trans(x), weights.to(x.dtype), total, input_precision="ieee")
    to = dfn + tl.program_id(1).to(tl.int64) * (ROWS * width) + lines * width + columns[:, None]
    tl.store(to, total, inside[:, None])


@triton.jit
def sum_parts(parts, dpost, dcomb, tokens, slices, SLICES: tl.constexpr, TOKENS: tl.constexpr):
    """Sum `parts` [S, 20, T] over S for one of the 20 gates and some tokens, into dpost [T, 4] and dcomb [T, 4, 4]."""
    gate = tl.program_id(1)
    rows = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    seen, slice_ = rows < tokens, tl.arange(0, SLICES)[:, None]
    place = (slice_.to(tl.int64) * 20 + gate) * tokens + rows[None, :]
    total = tl.sum(tl.load(parts + place, (slice_ < slices) & seen[None, :], 0.0), 0)
    if gate < 4:
        tl.store(dpost + rows * 4 + gate, total, seen)
    else:
        tl.store(dcomb + rows * 16 + gate - 4, total, seen)
