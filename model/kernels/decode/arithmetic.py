"""Scalar and row arithmetic that the compiler turns into vector instructions: exponential, sigmoid, RMS norm, rotation."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from model.kernels.decode.compiled import compiled

ONE, ZERO = np.float32(1), np.float32(0)
_LOG2E, _LN2_HIGH, _LN2_LOW = np.float32(1.4426950408889634), np.float32(0.693359375), np.float32(-2.12194440e-4)
"""ln 2 in two parts, the first with so few digits that its multiples are exact. Source: Cody and Waite, 1980."""
_LOWEST, _HIGHEST, _HALF = np.float32(-87.3), np.float32(88.0), np.float32(0.5)
_C2, _C3, _C4, _C5, _C6, _C7 = (np.float32(1 / f) for f in (2, 6, 24, 120, 720, 5040))


def _float_of(typingctx, bits):
    """Read the bits of an int32 as a float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), generate


def _bits_of(typingctx, value):
    """Read the bits of a float32 as an int32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.int32(types.float32), generate


float_of: Any = intrinsic(_float_of)
bits_of: Any = intrinsic(_bits_of)


@compiled(exactly=True)
def exp(x):
    """Compute e^x in fp32 to two units in the last place; 0 below -87.3, e^88 above 88."""
    bounded = _HIGHEST if x > _HIGHEST else x
    bounded = _LOWEST if bounded < _LOWEST else bounded
    power = np.floor(bounded * _LOG2E + _HALF)
    r = bounded - power * _LN2_HIGH - power * _LN2_LOW
    tail = _C2 + r * (_C3 + r * (_C4 + r * (_C5 + r * (_C6 + r * _C7))))
    result = (ONE + (r + r * r * tail)) * float_of((np.int32(power) + np.int32(127)) << np.int32(23))
    return ZERO if x < _LOWEST else result


@compiled()
def sigmoid(x):
    """Compute 1 / (1 + e^-x) in fp32."""
    return ONE / (ONE + exp(-x))


@compiled()
def copy(x, out):
    """Copy a row."""
    for i in range(len(x)):
        out[i] = x[i]


@compiled()
def exp_all(x):
    """Replace the numbers of a flat array by their exponentials, in a loop long enough to become vector instructions."""
    for i in range(len(x)):
        x[i] = exp(x[i])


@compiled()
def sigmoid_all(x):
    """Replace the numbers of a flat array by their sigmoids."""
    for i in range(len(x)):
        x[i] = sigmoid(x[i])


@compiled()
def inverse_rms(x, eps):
    """Compute 1 / sqrt(mean(x^2) + eps) of a row."""
    total = ZERO
    for i in range(len(x)):
        total += x[i] * x[i]
    return ONE / np.sqrt(total / np.float32(len(x)) + eps)


@compiled()
def normalise(x, weight, eps, out):
    """Divide a row by its root mean square and scale it; `out` may be `x`."""
    inverse = inverse_rms(x, eps)
    for i in range(len(weight)):
        out[i] = x[i] * inverse * weight[i]


@compiled()
def rotate(x, turns, sign):
    """Rotate the last pairs of a row in place.

    Args:
        x: [K].
        turns: [R / 2, 2] cosine and sine.
        sign: 1, or -1 to rotate back.
    """
    first = len(x) - 2 * len(turns)
    for i in range(len(turns)):
        even, odd, cos, sin = x[first + 2 * i], x[first + 2 * i + 1], turns[i, 0], turns[i, 1] * sign
        x[first + 2 * i] = even * cos - odd * sin
        x[first + 2 * i + 1] = even * sin + odd * cos
