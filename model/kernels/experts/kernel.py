"""What lies between the experts' grouped products: laying tokens out by expert, the gated activation, and summing the choices."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def spread_tokens(x, slots, out, active, width, BLOCK: tl.constexpr):
    """out_(slots_ta) = x_t for every choice a, one program a block of a token, which is read once."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    row = tl.load(x + token * width + columns, inside)
    for choice in range(active):
        tl.store(out + tl.load(slots + token * active + choice) * width + columns, row, inside)


@triton.jit
def sum_rows(first, second, slots, out, active, width, BOTH: tl.constexpr, BLOCK: tl.constexpr, beside=None):
    """out_t = sum_a first_(slots_ta) (+ second_(slots_ta)) (+ beside_t) in fp32, one program a block of a token."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    total = tl.zeros([BLOCK], tl.float32)
    if beside is not None:
        total += tl.load(beside + token * width + columns, inside, 0.0).to(tl.float32)
    for choice in range(active):
        place = tl.load(slots + token * active + choice) * width + columns
        total += tl.load(first + place, inside, 0.0).to(tl.float32)
        if BOTH:
            total += tl.load(second + place, inside, 0.0).to(tl.float32)
    tl.store(out + token * width + columns, total.to(out.dtype.element_ty), inside)


@triton.jit
def _clamped(gate, up, limit):
    """Return both branches within their limits, where NaN stays NaN, and the sigmoid of the first."""
    g = tl.minimum(gate, limit, propagate_nan=tl.PropagateNan.ALL)
    return g, tl.clamp(up, -limit, limit, propagate_nan=tl.PropagateNan.ALL), tl.sigmoid(g)


@triton.jit
def swiglu(gate, up, limit):
    """silu(min(gate, l)) clamp(up, -l, l) of fp32 numbers."""
    g, u, s = _clamped(gate, up, limit)
    return g * s * u


@triton.jit
def _swiglu_backward(d, gate, up, limit):
    """Return the gradients of both branches of `swiglu`, and its result."""
    g, u, s = _clamped(gate, up, limit)
    dg = tl.where(gate >= limit, 0.0, d * u * s * (1 + g * (1 - s)))
    du = tl.where(tl.abs(up) >= limit, 0.0, d * g * s)
    return dg, du, g * s * u


@triton.jit
def gate_rows(gate, up, share, order, out, width, limit, BLOCK: tl.constexpr, BESIDE: tl.constexpr = False):
    """out_i = share_(order_i) silu(min(gate_i, l)) clamp(up_i, -l, l), one program a block of a row.

    With BESIDE the rows of gate and up lie beside each other, 2 F apart.
    """
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    place = row * width * (2 if BESIDE else 1) + columns
    g, u = tl.load(gate + place, inside, 0.0).to(tl.float32), tl.load(up + place, inside, 0.0).to(tl.float32)
    hidden = tl.load(share + tl.load(order + row)).to(tl.float32) * swiglu(g, u, limit)
    tl.store(out + row * width + columns, hidden.to(out.dtype.element_ty), inside)


@triton.jit
def gate_rows_backward(grad, gate, up, share, order, dgate, dup, out, dshare, count, width, limit, BESIDE: tl.constexpr,
                       ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Gradients of `gate_rows`, and its result again; one program some whole rows. dshare has the order of `share`."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    seen = rows < count
    number = tl.load(order + rows, seen, 0)
    weight = tl.load(share + number, seen, 0.0).to(tl.float32)[:, None]
    along = tl.zeros([ROWS], tl.float32)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)[None, :]
        mask = seen[:, None] & (columns < width)
        narrow = rows.to(tl.int64)[:, None] * width + columns
        place = rows.to(tl.int64)[:, None] * width * (2 if BESIDE else 1) + columns
        d = tl.load(grad + narrow, mask, 0.0).to(tl.float32)
        g, u = tl.load(gate + place, mask, 0.0).to(tl.float32), tl.load(up + place, mask, 0.0).to(tl.float32)
        dg, du, hidden = _swiglu_backward(d * weight, g, u, limit)
        along += tl.sum(d * hidden, 1)
        tl.store(out + narrow, (weight * hidden).to(out.dtype.element_ty), mask)
        tl.store(dgate + place, dg.to(dgate.dtype.element_ty), mask)
        tl.store(dup + place, du.to(dup.dtype.element_ty), mask)
    tl.store(dshare + number, along, seen)


@triton.jit
def gate_pairs(both, out, count, width, limit, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """out = silu(min(gate, l)) clamp(up, -l, l) of gate and up beside each other, [T, 2 F] to [T, F]; a program a tile."""
    rows, columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = (rows < count)[:, None] & (columns < width)[None, :]
    lines = rows.to(tl.int64)[:, None]
    at = both + lines * (2 * width) + columns[None, :]
    gate, up = tl.load(at, mask, 0.0).to(tl.float32), tl.load(at + width, mask, 0.0).to(tl.float32)
    tl.store(out + lines * width + columns[None, :], swiglu(gate, up, limit).to(out.dtype.element_ty), mask)


@triton.jit
def gate_pairs_backward(grad, both, dboth, count, width, limit, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Gradient of `gate_pairs`."""
    rows, columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = (rows < count)[:, None] & (columns < width)[None, :]
    lines = rows.to(tl.int64)[:, None]
    place = lines * (2 * width) + columns[None, :]
    d = tl.load(grad + lines * width + columns[None, :], mask, 0.0).to(tl.float32)
    gate, up = tl.load(both + place, mask, 0.0).to(tl.float32), tl.load(both + place + width, mask, 0.0).to(tl.float32)
    dg, du, _ = _swiglu_backward(d, gate, up, limit)
    tl.store(dboth + place, dg.to(dboth.dtype.element_ty), mask)
    tl.store(dboth + place + width, du.to(dboth.dtype.element_ty), mask)
