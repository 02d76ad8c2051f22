"""The Gram form of Newton-Schulz for matrices of many shapes in one launch each: what a program works on stands in a table."""

from __future__ import annotations

import triton
import triton.language as tl

from model.kernels.newton_schulz.reference import SMALLEST_NORM

SMALLEST = tl.constexpr(SMALLEST_NORM)


@triton.jit
def symmetric_product(table, a, b, c, out, second, alpha, beta, diagonal, ADD: tl.constexpr, SECOND: tl.constexpr,
                      TILE: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """out = alpha A B^T + beta C and second = out + diagonal I, where all are symmetric: a tile of the lower triangle, stored twice.

    A row of the table: where A and B [size, depth] begin, depth, where C and out [size, size] begin, size, and the tile's row and column.
    All matrices are dense, `TILE` divides size and `BLOCK` depth.
    """
    entry = table + tl.program_id(0) * 6
    inputs, depth = tl.multiple_of(tl.load(entry), 16), tl.multiple_of(tl.load(entry + 1).to(tl.int32), 16)
    outputs, size = tl.multiple_of(tl.load(entry + 2), 16), tl.multiple_of(tl.load(entry + 3).to(tl.int32), 16)
    row, column = tl.load(entry + 4).to(tl.int32), tl.load(entry + 5).to(tl.int32)
    lines, others, deep = row * TILE + tl.arange(0, TILE), column * TILE + tl.arange(0, TILE), tl.arange(0, BLOCK)
    a_at = a + inputs + (lines.to(tl.int64) * depth)[:, None] + deep[None, :]
    b_at = b + inputs + (others.to(tl.int64) * depth)[:, None] + deep[None, :]
    total = tl.zeros([TILE, TILE], tl.float32)
    for start in tl.range(0, depth, BLOCK, num_stages=STAGES):
        total = tl.dot(tl.load(a_at + start), tl.trans(tl.load(b_at + start)), total, input_precision="ieee")
    total *= alpha
    place = outputs + lines.to(tl.int64)[:, None] * size + others[None, :]
    mirror = outputs + others.to(tl.int64)[:, None] * size + lines[None, :]
    if ADD:
        total += beta * tl.load(c + place).to(tl.float32)
    rounded = total.to(out.dtype.element_ty)
    if row > column:
        tl.store(out + place, rounded)
        tl.store(out + mirror, tl.trans(rounded))
        if SECOND:
            tl.store(second + place, rounded)
            tl.store(second + mirror, tl.trans(rounded))
    else:  # what is above the diagonal was rounded otherwise than what is below
        even = tl.where(lines[:, None] >= others[None, :], rounded, tl.trans(rounded))
        tl.store(out + place, even)
        if SECOND:
            shifted = even.to(tl.float32) + tl.where(lines[:, None] == others[None, :], diagonal, 0.0)
            tl.store(second + place, shifted.to(out.dtype.element_ty))


@triton.jit
def sum_squares(source, places, matrices, owners, out, PIECE: tl.constexpr, ALIGNED: tl.constexpr):
    """Sum the squares of a piece of a matrix in source into out, which has one number a piece. The tables: see `plan`."""
    matrix = tl.load(owners + tl.program_id(0))
    entry = matrices + matrix * 5
    first, rows, columns = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    inside = (tl.program_id(0) - first) * PIECE + tl.arange(0, PIECE)
    at = source + tl.multiple_of(tl.load(places + matrix), ALIGNED) + inside
    values = tl.load(at, inside < tl.multiple_of(rows * columns, ALIGNED), 0.0).to(tl.float32)
    tl.store(out + tl.program_id(0), tl.sum(values * values, 0))


@triton.jit
def norms(squares, matrices, out, BLOCK: tl.constexpr):
    """Take the root of the sum of each matrix's numbers in squares, at least `SMALLEST`: a program a matrix."""
    entry = matrices + tl.program_id(0) * 5
    first, last = tl.load(entry).to(tl.int32), tl.load(entry + 5).to(tl.int32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in tl.range(first, last, BLOCK):
        number = start + tl.arange(0, BLOCK)
        total += tl.load(squares + number, number < last, 0.0)
    tl.store(out + tl.program_id(0), tl.maximum(tl.sqrt_rn(tl.sum(total, 0)), SMALLEST, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def _piece(places, matrices, owners, HIGH: tl.constexpr, WIDE: tl.constexpr, ALIGNED: tl.constexpr):
    """Return the matrix of this program's piece, where the piece is in x, where the matrix begins outside, and what it holds of it."""
    number = tl.program_id(0)
    matrix = tl.load(owners + number)
    entry = matrices + matrix * 5
    rows, columns = tl.multiple_of(tl.load(entry + 1), ALIGNED), tl.multiple_of(tl.load(entry + 2), ALIGNED)
    start, depth = tl.multiple_of(tl.load(entry + 3), 16), tl.multiple_of(tl.load(entry + 4), 16)
    local, across = number - tl.load(entry).to(tl.int32), (depth // WIDE).to(tl.int32)
    lines, deep = local // across * HIGH + tl.arange(0, HIGH), local % across * WIDE + tl.arange(0, WIDE)
    place = tl.multiple_of(tl.load(places + matrix), ALIGNED)
    return matrix, start + lines[:, None] * depth + deep[None, :], place, lines[:, None], deep[None, :], rows, columns


@triton.jit
def normalise(source, norm, places, matrices, owners, x, HIGH: tl.constexpr, WIDE: tl.constexpr, ALIGNED: tl.constexpr):
    """Write a piece [HIGH, WIDE] of x: source over its norm, lying, and zeros around it."""
    matrix, at, place, lines, deep, rows, columns = _piece(places, matrices, owners, HIGH, WIDE, ALIGNED)
    if rows > columns:
        values = tl.load(source + place + deep * columns + lines, (lines < columns) & (deep < rows), 0.0).to(tl.float32)
    else:
        values = tl.load(source + place + lines * columns + deep, (lines < rows) & (deep < columns), 0.0).to(tl.float32)
    tl.store(x + at, (values / tl.load(norm + matrix)).to(x.dtype.element_ty))


@triton.jit
def put_back(x, places, matrices, owners, target, rms, HIGH: tl.constexpr, WIDE: tl.constexpr, ALIGNED: tl.constexpr,
             SCALE: tl.constexpr):  # fmt: skip
    """Write a piece of x to target as it stands there, times rms and, with SCALE, the root of the longer side."""
    _, at, place, lines, deep, rows, columns = _piece(places, matrices, owners, HIGH, WIDE, ALIGNED)
    values = tl.load(x + at).to(tl.float32) * rms
    if SCALE:
        values *= tl.sqrt_rn(tl.maximum(rows, columns).to(tl.float32))
    values = values.to(target.dtype.element_ty)
    if rows > columns:
        tl.store(target + place + deep * columns + lines, values, (lines < columns) & (deep < rows))
    else:
        tl.store(target + place + lines * columns + deep, values, (lines < rows) & (deep < columns))
