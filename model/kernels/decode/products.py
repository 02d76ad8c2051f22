"""Products of small fp32 matrices by packed weights: register tiles, in whose place a library call would cost more than its arithmetic.

A weight [O, K] is packed once into panels [O / 16, K, 16], so that a tile of rows walks down a panel with one vector load for all its
rows. Every output is one chain of fused multiply-adds over k, whatever tile computes it: a row's result does not depend on its batch.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

LANES = 16
"""Outputs of a panel: one AVX-512 register of fp32, two of AVX2."""
_STRICT: dict[str, Any] = {"nogil": True, "error_model": "numpy", "cache": True, "_nrt": False}
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


def _tile(rows: int) -> Any:
    """Make the intrinsic `tile(a, w, c, depth, adds)` of a fixed number of rows by 16 outputs.

    a = (array, offset, elements between rows, elements between steps of k), w = (array, offset, elements between steps of k),
    c = (array, offset, elements between rows); computes c[r] = (c[r] if adds else 0) + sum_k a[r, k] w[k].
    """

    @intrinsic
    def tile(typingctx, a, w, c, depth, adds):
        def generate(context, builder, signature, arguments):
            values = dict(zip("awc", arguments))
            kinds = dict(zip("awc", signature.args))

            def place(name: str) -> tuple[Any, list[Any]]:
                """Return a pointer to an operand's first element, and its strides."""
                array, offset, *strides = cgutils.unpack_tuple(builder, values[name])
                data = context.make_array(kinds[name].types[0])(context, builder, array).data
                return builder.gep(data, [offset]), strides

            def step(pointer: Any, count: Any, stride: Any) -> Any:
                return builder.gep(pointer, [builder.mul(count, stride)])

            def vector(pointer: Any) -> Any:
                return builder.bitcast(pointer, _VECTOR.as_pointer())

            (first, (row, along)), (weights, (down,)), (out, (apart,)) = place("a"), place("w"), place("c")
            starts = [step(first, _INT(r), row) for r in range(rows)]
            ends = [step(out, _INT(r), apart) for r in range(rows)]
            sums = [cgutils.alloca_once(builder, _VECTOR) for _ in range(rows)]
            with builder.if_else(arguments[4]) as (adding, anew):
                with adding:
                    for total, end in zip(sums, ends):
                        builder.store(builder.load(vector(end), align=4), total)
                with anew:
                    for total in sums:
                        builder.store(ir.Constant(_VECTOR, [0.0] * LANES), total)
            with cgutils.for_range(builder, arguments[3]) as loop:
                panel = builder.load(vector(step(weights, loop.index, down)), align=4)
                for total, start in zip(sums, starts):
                    factor = _broadcast(builder, builder.load(step(start, loop.index, along)))
                    product = builder.fmul(factor, panel, flags=("contract",))
                    builder.store(builder.fadd(builder.load(total), product, flags=("contract",)), total)
            for total, end in zip(sums, ends):
                builder.store(builder.load(total), vector(end), align=4)
            return context.get_dummy_value()

        return types.void(a, w, c, types.int64, types.boolean), generate

    return tile


def _broadcast(builder: Any, value: Any) -> Any:
    undefined, zero = ir.Constant(_VECTOR, ir.Undefined), ir.IntType(32)(0)
    one = builder.insert_element(undefined, value, zero)
    return builder.shuffle_vector(one, undefined, ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES))


_HIGH, _MIDDLE = (16, 4) if get_host_cpu_features().get("avx512f", False) else (6, 3)
"""Rows of the tiles: as many sums as fit into the vector registers, 32 of AVX-512 or 16 of half the width, and fewer for what is left."""
_high, _middle, _one = _tile(_HIGH), _tile(_MIDDLE), _tile(1)


@njit(**_STRICT)
def panel(a, w, c, rows, depth, adds):
    """Multiply `rows` rows by one panel of 16 outputs; operands as a tile takes them."""
    x, at, apart, along = a
    y, out, down = c
    row = 0
    while row + _HIGH <= rows:
        _high((x, at + row * apart, apart, along), w, (y, out + row * down, down), depth, adds)
        row += _HIGH
    while row + _MIDDLE <= rows:
        _middle((x, at + row * apart, apart, along), w, (y, out + row * down, down), depth, adds)
        row += _MIDDLE
    while row < rows:
        _one((x, at + row * apart, apart, along), w, (y, out + row * down, down), depth, adds)
        row += 1


@njit(**_STRICT)
def product(a, w, c, rows):
    """Compute c = a w^T for some rows.

    Args:
        a: (array, offset of the first row, elements between rows); K elements of a row lie together.
        w: [P, K, 16] packed weight.
        c: (array, offset of the first row, elements between rows), with room for 16 P elements a row.
        rows: how many.
    """
    x, at, apart = a
    y, out, down = c
    panels, depth, lanes = w.shape
    for p in range(panels):
        panel((x, at, apart, 1), (w, p * depth * lanes, lanes), (y, out + p * lanes, down), rows, depth, False)
