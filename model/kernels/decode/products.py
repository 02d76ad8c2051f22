"""Products of small fp32 matrices by packed weights: register tiles, in whose place a library call would cost more than its arithmetic.

A weight [O, K] is packed once into panels [O / 16, K, 16], so that a tile of rows walks down a panel with one vector load for all its
rows. Every output is one chain of fused multiply-adds over k, whatever tile computes it: a row's result does not depend on its batch.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from model.kernels.decode.compiled import compiled

LANES = 16
"""Outputs of a panel: one AVX-512 register of fp32, two of AVX2."""
_VECTOR = ir.VectorType(ir.FloatType(), LANES)
_INT = ir.IntType(64)


def pack(weight: NDArray[np.float32]) -> NDArray[np.float32]:
    """Lay a weight [..., O, K] out in panels [..., P, K, 16], P = ceil(O / 16), with zeros after the last output."""
    *stack, outputs, depth = weight.shape
    panels = -(-outputs // LANES)
    if outputs % LANES:
        weight = np.concatenate([weight, np.zeros((*stack, panels * LANES - outputs, depth), np.float32)], -2)
    return np.ascontiguousarray(weight.reshape(*stack, panels, LANES, depth).swapaxes(-1, -2))


def padded(outputs: int) -> int:
    """Round a number of outputs up to whole panels: what a row of a product's result must have room for."""
    return -(-outputs // LANES) * LANES


def _at(typingctx, array, offset):
    """Point to an element of a contiguous fp32 array."""

    def generate(context, builder, signature, arguments):
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        return builder.gep(data, [arguments[1]])

    return types.CPointer(types.float32)(array, types.int64), generate


def _step_from(typingctx, pointer, count):
    """Move a pointer by elements."""

    def generate(context, builder, signature, arguments):
        return builder.gep(arguments[0], [arguments[1]])

    return pointer(pointer, types.int64), generate


at: Any = intrinsic(_at)
_step: Any = intrinsic(_step_from)


def _tile(rows: int, panels: int) -> Any:
    """Make the intrinsic `tile(a, w, c, depth, adds)` of a fixed number of rows and panels; operands as `multiply` takes them."""

    def tile(typingctx, a, w, c, depth, adds):
        def generate(context, builder, signature, arguments):
            (first, row), (weights, down, across), (out, apart) = (cgutils.unpack_tuple(builder, x) for x in arguments[:3])
            starts = [_move(builder, first, _INT(r), row) for r in range(rows)]
            tops = [_move(builder, weights, _INT(p), across) for p in range(panels)]
            places = [(r, p) for r in range(rows) for p in range(panels)]
            ends = [_vector(builder, _move(builder, _move(builder, out, _INT(r), apart), _INT(p), _INT(LANES))) for r, p in places]
            sums = [cgutils.alloca_once(builder, _VECTOR) for _ in places]
            with builder.if_else(arguments[4]) as (adding, anew):
                with adding:
                    for total, end in zip(sums, ends):
                        builder.store(builder.load(end, align=4), total)
                with anew:
                    for total in sums:
                        builder.store(ir.Constant(_VECTOR, [0.0] * LANES), total)
            with cgutils.for_range(builder, arguments[3]) as loop:
                columns = [builder.load(_vector(builder, _move(builder, top, loop.index, down)), align=4) for top in tops]
                factors = [_broadcast(builder, builder.load(builder.gep(start, [loop.index]))) for start in starts]
                for total, (r, p) in zip(sums, places):
                    product = builder.fmul(factors[r], columns[p], flags=("contract",))
                    builder.store(builder.fadd(builder.load(total), product, flags=("contract",)), total)
            for total, end in zip(sums, ends):
                builder.store(builder.load(total), end, align=4)
            return context.get_dummy_value()

        return types.void(a, w, c, types.int64, types.boolean), generate

    return intrinsic(tile)


def _move(builder: Any, pointer: Any, count: Any, stride: Any) -> Any:
    return builder.gep(pointer, [builder.mul(count, stride)])


def _vector(builder: Any, pointer: Any) -> Any:
    return builder.bitcast(pointer, _VECTOR.as_pointer())


def _broadcast(builder: Any, value: Any) -> Any:
    undefined, zero = ir.Constant(_VECTOR, ir.Undefined), ir.IntType(32)(0)
    one = builder.insert_element(undefined, value, zero)
    return builder.shuffle_vector(one, undefined, ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES))


_TALL, (_LOW, _WIDE), _LINE = (16, (4, 4), 8) if get_host_cpu_features().get("avx512f", False) else (6, (2, 3), 6)
"""Rows and panels of the tiles, as many sums as fit into the vector registers, 32 of AVX-512 or 16 of half the width: tall ones of one
panel, low ones for the rows that are left, lines for the last. A sum waits for the one before, so that few at a time would wait mostly."""
_tall, _low, _low_one, _line, _one = _tile(_TALL, 1), _tile(_LOW, _WIDE), _tile(_LOW, 1), _tile(1, _LINE), _tile(1, 1)


@compiled(exactly=True)
def multiply(a, w, c, shape, adds):
    """Compute c[r, p] = (c[r, p] if adds else 0) + sum_k a[r, k] w[k, p] for rows r and panels p of 16 outputs.

    Args:
        a: (pointer, elements between rows); the steps of k lie together, pointers as `at` makes them.
        w: (pointer, elements between steps of k, elements between panels); the 16 of a panel lie together.
        c: (pointer, elements between rows); panels lie together.
        shape: rows, panels, steps of k.
        adds: whether to add to what is there.
    """
    x, apart = a
    m, down, across = w
    y, below = c
    rows, panels, depth = shape
    row = 0
    while row + _TALL <= rows:
        for p in range(panels):
            _tall((x, apart), (_step(m, p * across), down, across), (_step(y, p * LANES), below), depth, adds)
        row, x, y = row + _TALL, _step(x, _TALL * apart), _step(y, _TALL * below)
    while row + _LOW <= rows:
        p = 0
        while p + _WIDE <= panels:
            _low((x, apart), (_step(m, p * across), down, across), (_step(y, p * LANES), below), depth, adds)
            p += _WIDE
        while p < panels:
            _low_one((x, apart), (_step(m, p * across), down, across), (_step(y, p * LANES), below), depth, adds)
            p += 1
        row, x, y = row + _LOW, _step(x, _LOW * apart), _step(y, _LOW * below)
    while row < rows:
        p = 0
        while p + _LINE <= panels:
            _line((x, apart), (_step(m, p * across), down, across), (_step(y, p * LANES), below), depth, adds)
            p += _LINE
        while p < panels:
            _one((x, apart), (_step(m, p * across), down, across), (_step(y, p * LANES), below), depth, adds)
            p += 1
        row, x, y = row + 1, _step(x, apart), _step(y, below)


@compiled(exactly=True)
def product(a, w, c, rows):
    """Compute c = a w^T for some rows.

    Args:
        a: (pointer to the first row, elements between rows); K elements of a row lie together.
        w: [P, K, 16] packed weight.
        c: (pointer to the first row, elements between rows), with room for 16 P elements a row.
        rows: how many.
    """
    panels, depth, lanes = w.shape
    multiply(a, (at(w, 0), lanes, depth * lanes), c, (rows, panels, depth), np.bool_(False))


@compiled(exactly=True)
def map_rows(x, w, y, rows):
    """Compute the first rows of y [B, >= 16 P] from those of x [B, ...], both contiguous: `product` for a call from Python."""
    product((at(x, 0), x.size // len(x)), w, (at(y, 0), y.shape[1]), rows)
