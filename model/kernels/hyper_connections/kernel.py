"""The passes over four residual streams: projection, gates, mixing in and out, and their gradients. Arithmetic in fp32."""

from __future__ import annotations

import triton
import triton.language as tl

from model.kernels.sinkhorn.kernel import sinkhorn_backward_tile, sinkhorn_tile

ROWS = tl.constexpr(32)
"""The 24 rows of `fn`, filled up to a power of two."""


@triton.jit
def project(streams, fn, raw, squares, tokens, width, part, SPLIT: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
            STAGES: tl.constexpr):  # fmt: skip
    """Multiply streams [T, K] by fn^T [24, K] and sum their squares over the K slice of this program: raw [S, T, 32], squares [S, T].

    With SPLIT, fn goes into the products as two numbers of the streams' dtype, which together have (almost) all of its bits.
    """
    slice_ = tl.program_id(1)
    rows = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    seen = rows < tokens
    lines = tl.arange(0, ROWS)
    x_at = streams + rows.to(tl.int64)[:, None] * width
    high, low = tl.zeros([TOKENS, ROWS], tl.float32), tl.zeros([TOKENS, ROWS], tl.float32)
    square = tl.zeros([TOKENS], tl.float32)
    first = slice_ * part
    for start in tl.range(first, tl.minimum(first + part, width), BLOCK, num_stages=STAGES):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < width
        x = tl.load(x_at + columns[None, :], seen[:, None] & inside[None, :], 0.0)
        wide = tl.load(fn + lines[None, :] * width + columns[:, None], inside[:, None] & (lines < 24)[None, :], 0.0).to(tl.float32)
        if SPLIT:
            near = wide.to(x.dtype)
            high = tl.dot(x, near, high)
            low = tl.dot(x, (wide - near.to(tl.float32)).to(x.dtype), low)
        else:
            high = tl.dot(x, wide, high, input_precision="ieee")
        x = x.to(tl.float32)
        square += tl.sum(x * x, 1)
    place = slice_.to(tl.int64) * tokens + rows
    tl.store(raw + place[:, None] * ROWS + lines[None, :], high + low, seen[:, None])
    tl.store(squares + place, square, seen)


@triton.jit
def _of(values, number):
    """Take one of the columns [B, 4]."""
    return tl.sum(tl.where(tl.arange(0, 4)[None, :] == number, values, 0.0), 1)


@triton.jit
def collapse(streams, raw, squares, base, scale, out, pre, post, comb, mixes, inverse, tokens, width, slices, norm_eps, eps,
             ITERATIONS: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Turn the projections into pre and post [T, 4] and comb [T, 4, 4], and sum the streams: out = sum_j pre_j X_j.

    For the backward pass the projections' sum over slices stays in mixes [T, 32], and 1 / rms in inverse [T].
    """
    rows = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    seen = rows < tokens
    four, j, k = tl.arange(0, 4)[None, :], tl.arange(0, 4)[None, :, None], tl.arange(0, 4)[None, None, :]
    square = tl.zeros([TOKENS], tl.float32)
    into, back = tl.zeros([TOKENS, 4], tl.float32), tl.zeros([TOKENS, 4], tl.float32)
    across = tl.zeros([TOKENS, 4, 4], tl.float32)
    flat, cube = seen[:, None], seen[:, None, None]
    for part in range(slices):
        place = part * tokens + rows
        square += tl.load(squares + place, seen, 0.0)
        into += tl.load(raw + place[:, None] * ROWS + four, flat, 0.0)
        back += tl.load(raw + place[:, None] * ROWS + 4 + four, flat, 0.0)
        across += tl.load(raw + place[:, None, None] * ROWS + 8 + 4 * j + k, cube, 0.0)
    inv = tl.rsqrt(square / (4 * width) + norm_eps)
    tl.store(inverse + rows, inv, seen)
    tl.store(mixes + rows[:, None] * ROWS + four, into, flat)
    tl.store(mixes + rows[:, None] * ROWS + 4 + four, back, flat)
    tl.store(mixes + rows[:, None, None] * ROWS + 8 + 4 * j + k, across, cube)
    into = tl.sigmoid(into * inv[:, None] * tl.load(scale) + tl.load(base + four)) + eps
    tl.store(pre + rows[:, None] * 4 + four, into, flat)
    back = tl.sigmoid(back * inv[:, None] * tl.load(scale + 1) + tl.load(base + 4 + four))
    tl.store(post + rows[:, None] * 4 + four, 2 * back, flat)
    logits = across * inv[:, None, None] * tl.load(scale + 2) + tl.load(base + 8 + 4 * j + k)
    matrix, _ = sinkhorn_tile(logits, comb, eps, ITERATIONS, False)
    tl.store(comb + rows[:, None, None] * 16 + 4 * j + k, matrix, cube)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)[None, :]
        mask = flat & (columns < width)
        at = streams + rows.to(tl.int64)[:, None] * (4 * width) + columns
        x0, x1 = tl.load(at, mask, 0.0), tl.load(at + width, mask, 0.0)
        x2, x3 = tl.load(at + 2 * width, mask, 0.0), tl.load(at + 3 * width, mask, 0.0)
        total = _of(into, 0)[:, None] * x0.to(tl.float32) + _of(into, 1)[:, None] * x1.to(tl.float32)
        total += _of(into, 2)[:, None] * x2.to(tl.float32) + _of(into, 3)[:, None] * x3.to(tl.float32)
        tl.store(out + rows.to(tl.int64)[:, None] * width + columns, total.to(out.dtype.element_ty), mask)


@triton.jit
def expand(output, streams, post, comb, out, width, BLOCK: tl.constexpr):
    """out_k = post_k f + sum_j comb_jk X_j, one program a block of a token."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    f = tl.load(output + token * width + columns, inside, 0.0).to(tl.float32)
    x = streams + token * 4 * width + columns
    x0 = tl.load(x, inside, 0.0).to(tl.float32)
    x1 = tl.load(x + width, inside, 0.0).to(tl.float32)
    x2 = tl.load(x + 2 * width, inside, 0.0).to(tl.float32)
    x3 = tl.load(x + 3 * width, inside, 0.0).to(tl.float32)
    post += token * 4
    comb += token * 16
    out += token * 4 * width + columns
    for k in tl.static_range(4):
        c = comb + k
        mixed = tl.load(post + k) * f + tl.load(c) * x0 + tl.load(c + 4) * x1 + tl.load(c + 8) * x2 + tl.load(c + 12) * x3
        tl.store(out + k * width, mixed.to(out.dtype.element_ty), inside)


@triton.jit
def _four_sums(a, b, c, d):
    """Sum four vectors in one reduction; returns [2, 2] with a and b in the first row."""
    return tl.sum(tl.join(tl.join(a, c), tl.join(b, d)), 0)


@triton.jit
def expand_backward(grad, output, streams, post, comb, doutput, dstreams, dpost, dcomb, width, BLOCK: tl.constexpr):
    """All gradients of `expand`, one program a token; BLOCK covers the width."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    g, x = grad + token * 4 * width + columns, streams + token * 4 * width + columns
    g0, g1 = tl.load(g, inside, 0.0), tl.load(g + width, inside, 0.0)
    g2, g3 = tl.load(g + 2 * width, inside, 0.0), tl.load(g + 3 * width, inside, 0.0)
    f = tl.load(output + token * width + columns, inside, 0.0).to(tl.float32)
    x0, x1 = tl.load(x, inside, 0.0), tl.load(x + width, inside, 0.0)
    x2, x3 = tl.load(x + 2 * width, inside, 0.0), tl.load(x + 3 * width, inside, 0.0)
    g0, g1, g2, g3 = g0.to(tl.float32), g1.to(tl.float32), g2.to(tl.float32), g3.to(tl.float32)
    post += token * 4
    df = tl.load(post) * g0 + tl.load(post + 1) * g1 + tl.load(post + 2) * g2 + tl.load(post + 3) * g3
    tl.store(doutput + token * width + columns, df.to(doutput.dtype.element_ty), inside)
    square = tl.arange(0, 2)[:, None] * 2 + tl.arange(0, 2)[None, :]
    tl.store(dpost + token * 4 + square, _four_sums(f * g0, f * g1, f * g2, f * g3))
    for j in tl.static_range(4):
        y = (x0 if j == 0 else x1 if j == 1 else x2 if j == 2 else x3).to(tl.float32)
        c = comb + token * 16 + 4 * j
        dx = tl.load(c) * g0 + tl.load(c + 1) * g1 + tl.load(c + 2) * g2 + tl.load(c + 3) * g3
        tl.store(dstreams + (token * 4 + j) * width + columns, dx.to(dstreams.dtype.element_ty), inside)
        tl.store(dcomb + token * 16 + 4 * j + square, _four_sums(y * g0, y * g1, y * g2, y * g3))


@triton.jit
def _along(grad, streams, rows, tokens, width, TOKENS: tl.constexpr, BLOCK: tl.constexpr):
    """<d, X_j> of some tokens, [TOKENS, 4]."""
    s0, s1 = tl.zeros([TOKENS, BLOCK], tl.float32), tl.zeros([TOKENS, BLOCK], tl.float32)
    s2, s3 = tl.zeros([TOKENS, BLOCK], tl.float32), tl.zeros([TOKENS, BLOCK], tl.float32)
    lines = rows.to(tl.int64)[:, None]
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)[None, :]
        mask = (rows < tokens)[:, None] & (columns < width)
        at = streams + lines * (4 * width) + columns
        d = tl.load(grad + lines * width + columns, mask, 0.0).to(tl.float32)
        x0, x1 = tl.load(at, mask, 0.0), tl.load(at + width, mask, 0.0)
        x2, x3 = tl.load(at + 2 * width, mask, 0.0), tl.load(at + 3 * width, mask, 0.0)
        s0 += d * x0.to(tl.float32)
        s1 += d * x1.to(tl.float32)
        s2 += d * x2.to(tl.float32)
        s3 += d * x3.to(tl.float32)
    four = tl.arange(0, 4)[None, :]
    even = tl.where(four == 0, tl.sum(s0, 1)[:, None], tl.sum(s2, 1)[:, None])
    odd = tl.where(four == 1, tl.sum(s1, 1)[:, None], tl.sum(s3, 1)[:, None])
    return tl.where(four % 2 == 0, even, odd)


@triton.jit
def gates_backward(grad, streams, mixes, inverse, base, scale, dpost, dcomb, draw, dsquare, sums, totals, tokens, width, eps,
                   ITERATIONS: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Gradients of the projections draw [T, 32], of the squares' sum (times 2) [T], and this program's share of base's and scale's."""
    program = tl.program_id(0)
    rows = program * TOKENS + tl.arange(0, TOKENS)
    seen = rows < tokens
    four, j, k = tl.arange(0, 4)[None, :], tl.arange(0, 4)[None, :, None], tl.arange(0, 4)[None, None, :]
    flat, cube = seen[:, None], seen[:, None, None]
    dpre = _along(grad, streams, rows, tokens, width, TOKENS, BLOCK)
    narrow, wide = rows[:, None] * ROWS + four, rows[:, None, None] * ROWS + 8 + 4 * j + k
    inv = tl.load(inverse + rows, seen, 0.0)
    into, back = tl.load(mixes + narrow, flat, 0.0) * inv[:, None], tl.load(mixes + narrow + 4, flat, 0.0) * inv[:, None]
    across = tl.load(mixes + wide, cube, 0.0) * inv[:, None, None]
    scale_in, scale_back, scale_across = tl.load(scale), tl.load(scale + 1), tl.load(scale + 2)
    gate = tl.sigmoid(into * scale_in + tl.load(base + four))
    din = dpre * gate * (1 - gate)
    gate = tl.sigmoid(back * scale_back + tl.load(base + 4 + four))
    dback = 2 * tl.load(dpost + rows[:, None] * 4 + four, flat, 0.0) * gate * (1 - gate)
    kept = sums + rows[:, None].to(tl.int64) * (8 * ITERATIONS) + four
    comb, soft = sinkhorn_tile(across * scale_across + tl.load(base + 8 + 4 * j + k), kept, eps, ITERATIONS, True)
    tl.debug_barrier()
    dmatrix = tl.load(dcomb + rows[:, None, None] * 16 + 4 * j + k, cube, 0.0)
    dacross = sinkhorn_backward_tile(dmatrix, comb, soft, kept, ITERATIONS)
    _sum_gates(totals + program * 2 * ROWS, din, dback, dacross)
    per_in, per_back, per_across = tl.sum(din * into, 1), tl.sum(dback * back, 1), tl.sum(tl.sum(dacross * across, 2), 1)
    tl.store(totals + program * 2 * ROWS + ROWS, tl.sum(per_in, 0))
    tl.store(totals + program * 2 * ROWS + ROWS + 1, tl.sum(per_back, 0))
    tl.store(totals + program * 2 * ROWS + ROWS + 2, tl.sum(per_across, 0))
    along = per_in * scale_in + per_back * scale_back + per_across * scale_across
    tl.store(dsquare + rows, -along * inv * inv / (4 * width), seen)
    tl.store(draw + narrow, din * (scale_in * inv)[:, None], flat)
    tl.store(draw + narrow + 4, dback * (scale_back * inv)[:, None], flat)
    tl.store(draw + wide, dacross * (scale_across * inv)[:, None, None], cube)


@triton.jit
def _sum_gates(at, din, dback, dacross):
    """Write sums over tokens of the gradients of the 24 mixes."""
    four = tl.arange(0, 4)
    tl.store(at + four, tl.sum(din, 0))
    tl.store(at + 4 + four, tl.sum(dback, 0))
    tl.store(at + 8 + four[:, None] * 4 + four[None, :], tl.sum(dacross, 0))


@triton.jit
def streams_backward(streams, grad, through, draw, dsquare, pre, fn, dstreams, dfn, tokens, width, group,
                     SPLIT: tl.constexpr, THROUGH: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
                     STAGES: tl.constexpr):  # fmt: skip
    """dX_j = pre_j d + draw fn_j + dsquare X_j (+ through), and draw^T X over a group of tokens: dfn [G, 32, 4 D]."""
    stream = tl.program_id(0) % 4
    columns = tl.program_id(0) // 4 * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    across = stream * width + columns
    lines, real = tl.arange(0, ROWS), tl.arange(0, ROWS) < 24
    first = tl.program_id(1) * group
    wide_fn = tl.load(fn + lines[:, None] * (4 * width) + across[None, :], real[:, None] & inside[None, :], 0.0).to(tl.float32)
    high_fn = wide_fn.to(streams.dtype.element_ty)
    low_fn = (wide_fn - high_fn.to(tl.float32)).to(streams.dtype.element_ty)
    total = tl.zeros([BLOCK, ROWS], tl.float32)
    for start in tl.range(first, tl.minimum(first + group, tokens), TOKENS, num_stages=STAGES):
        rows = start + tl.arange(0, TOKENS)
        seen = rows < tokens
        mask = seen[:, None] & inside[None, :]
        wide_rows = rows.to(tl.int64)[:, None]
        place = wide_rows * (4 * width) + across[None, :]
        x = tl.load(streams + place, mask, 0.0)
        d = tl.load(grad + wide_rows * width + columns[None, :], mask, 0.0).to(tl.float32)
        weights = tl.load(draw + rows[:, None] * ROWS + lines[None, :], seen[:, None] & real[None, :], 0.0)
        if SPLIT:
            high = weights.to(x.dtype)
            low = (weights - high.to(tl.float32)).to(x.dtype)
            dx = tl.dot(high, high_fn)
            dx = tl.dot(low, high_fn, dx)
            dx = tl.dot(high, low_fn, dx)
            total = tl.dot(tl.trans(x), high, total)
        else:
            dx = tl.dot(weights, wide_fn, input_precision="ieee")
            total = tl.dot(tl.trans(x), weights, total, input_precision="ieee")
        dx += tl.load(pre + rows * 4 + stream, seen, 0.0)[:, None] * d
        dx += tl.load(dsquare + rows, seen, 0.0)[:, None] * x.to(tl.float32)
        if THROUGH:
            dx += tl.load(through + place, mask, 0.0).to(tl.float32)
        tl.store(dstreams + place, dx.to(dstreams.dtype.element_ty), mask)
    base = dfn + tl.program_id(1).to(tl.int64) * (ROWS * 4 * width)
    tl.store(base + lines[None, :] * (4 * width) + across[:, None], total, inside[:, None])
