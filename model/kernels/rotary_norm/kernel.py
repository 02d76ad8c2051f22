"""Rows divided by their root mean square, scaled and rotated, and the gradients. Arithmetic in fp32, tiles of several rows."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _turned(x, turns, tokens, seen, width, sign, PAIRS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Rotate the last PAIRS adjacent pairs of each row [ROWS, BLOCK] by its token's turns [T, PAIRS, 2], backwards if sign is -1."""
    pair = tl.arange(0, BLOCK // 2)[None, :] - (width // 2 - PAIRS)
    at = turns + tokens.to(tl.int64)[:, None] * (2 * PAIRS) + 2 * pair
    mask = seen[:, None] & (pair >= 0) & (pair < PAIRS)
    cos, sin = tl.load(at, mask, 1.0), tl.load(at + 1, mask, 0.0) * sign
    even, odd = tl.split(tl.reshape(x, [ROWS, BLOCK // 2, 2]))
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), [ROWS, BLOCK])


@triton.jit
def normalise_rows(x, weight, turns, out, count, heads, width, stride, eps, sign, NORM: tl.constexpr, WEIGHT: tl.constexpr,
                   PAIRS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """out = R(w x rsqrt(mean x^2 + eps)) of rows [N, K] that are `stride` apart; `heads` rows share a token's turns."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    seen, inside = rows < count, columns < width
    mask = seen[:, None] & inside[None, :]
    y = tl.load(x + rows.to(tl.int64)[:, None] * stride + columns[None, :], mask, 0.0).to(tl.float32)
    if NORM:
        y *= tl.rsqrt(tl.sum(y * y, 1) / width + eps)[:, None]
    if WEIGHT:
        y *= tl.load(weight + columns, inside, 0.0).to(tl.float32)[None, :]
    if PAIRS > 0:
        y = _turned(y, turns, rows // heads, seen, width, sign, PAIRS, ROWS, BLOCK)
    tl.store(out + rows.to(tl.int64)[:, None] * width + columns[None, :], y.to(out.dtype.element_ty), mask)


@triton.jit
def normalise_rows_backward(grad, x, weight, turns, dx, dweight, count, heads, width, stride, eps, WEIGHT: tl.constexpr,
                            PAIRS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Gradients of `normalise_rows`: dx = (w h - u mean(u w h)) / rms with h the grad turned back; the norm is computed again.

    A program takes every n-th tile and leaves its share of the weight's gradient in its row of dweight [programs, K].
    """
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    total = tl.zeros([BLOCK], tl.float32)
    if WEIGHT:
        scale = tl.load(weight + columns, inside, 0.0).to(tl.float32)[None, :]
    for start in range(tl.program_id(0) * ROWS, count, tl.num_programs(0) * ROWS):
        rows = start + tl.arange(0, ROWS)
        seen = rows < count
        mask = seen[:, None] & inside[None, :]
        place = rows.to(tl.int64)[:, None]
        h = tl.load(grad + place * width + columns[None, :], mask, 0.0).to(tl.float32)
        u = tl.load(x + place * stride + columns[None, :], mask, 0.0).to(tl.float32)
        inverse = tl.rsqrt(tl.sum(u * u, 1) / width + eps)[:, None]
        u *= inverse
        if PAIRS > 0:
            h = _turned(h, turns, rows // heads, seen, width, -1.0, PAIRS, ROWS, BLOCK)
        if WEIGHT:
            total += tl.sum(h * u, 0)
            h *= scale
        d = (h - u * (tl.sum(u * h, 1) / width)[:, None]) * inverse
        tl.store(dx + place * width + columns[None, :], d.to(dx.dtype.element_ty), mask)
    if WEIGHT:
        tl.store(dweight + tl.program_id(0).to(tl.int64) * width + columns, total, inside)
