"""Products that are known to be symmetric: only the tiles on and below the diagonal are computed, and stored twice."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _tile(number, PAIR: tl.constexpr):
    """Number the tiles of a lower triangle along its rows; with PAIR tiles are twice as wide as high. Returns row and column."""
    if PAIR:
        row = ((tl.sqrt(4.0 * number + 1.0) - 1.0) * 0.5).to(tl.int32)
        row += tl.where((row + 1) * (row + 2) <= number, 1, 0)
        row -= tl.where(row * (row + 1) > number, 1, 0)
        rest = number - row * (row + 1)
        column = rest % (row + 1)
        row = 2 * row + rest // (row + 1)
    else:
        row = ((tl.sqrt(8.0 * number + 1.0) - 1.0) * 0.5).to(tl.int32)
        row += tl.where((row + 1) * (row + 2) // 2 <= number, 1, 0)
        row -= tl.where(row * (row + 1) // 2 > number, 1, 0)
        column = number - row * (row + 1) // 2
    return row, column


@triton.jit
def symmetric_product(a, b, c, out, size, depth, batch, gram_batch, stride, alpha, beta, ADD: tl.constexpr, FULL: tl.constexpr,
                      TILE: tl.constexpr, PAIR: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """out = alpha A B^T + beta C: A and B [size, depth] in rows of `stride`, C and out dense [size, size]; one program a tile.

    FULL promises that tiles and blocks divide size and depth.
    """
    row, column = _tile(tl.program_id(0), PAIR)
    sample = tl.program_id(1).to(tl.int64)
    WIDTH: tl.constexpr = TILE * 2 if PAIR else TILE
    lines, others, deep = row * TILE + tl.arange(0, TILE), column * WIDTH + tl.arange(0, WIDTH), tl.arange(0, BLOCK)
    a_at = a + sample * batch + (lines.to(tl.int64) * stride)[:, None] + deep[None, :]
    b_at = b + sample * batch + (others.to(tl.int64) * stride)[:, None] + deep[None, :]
    a_seen, b_seen = (lines < size)[:, None], (others < size)[:, None]
    total = tl.zeros([TILE, WIDTH], tl.float32)
    for start in tl.range(0, depth, BLOCK, num_stages=STAGES):
        if FULL:
            left, right = tl.load(a_at + start), tl.load(b_at + start)
        else:
            inside = (start + deep < depth)[None, :]
            left, right = tl.load(a_at + start, a_seen & inside, 0.0), tl.load(b_at + start, b_seen & inside, 0.0)
        total = tl.dot(left, tl.trans(right), total, input_precision="ieee")
    total *= alpha
    c += sample * gram_batch
    out += sample * gram_batch
    place = lines.to(tl.int64)[:, None] * size + others[None, :]
    mirror = others.to(tl.int64)[:, None] * size + lines[None, :]
    if FULL and column * WIDTH + WIDTH <= row * TILE:  # no mask: wide loads and stores
        if ADD:
            total += beta * tl.load(c + place).to(tl.float32)
        tl.store(out + place, total.to(out.dtype.element_ty))
        tl.store(out + mirror, tl.trans(total.to(out.dtype.element_ty)))
    else:
        lower = (lines[:, None] >= others[None, :]) & a_seen
        if ADD:
            total += beta * tl.load(c + place, lower, 0.0).to(tl.float32)
        tl.store(out + place, total.to(out.dtype.element_ty), lower)
        upper = (lines[None, :] > others[:, None]) & (lines < size)[None, :]
        tl.store(out + mirror, tl.trans(total.to(out.dtype.element_ty)), upper)
