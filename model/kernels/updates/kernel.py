"""The optimizer's element-wise steps on flat fp32 memory, every number read and written once."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def nesterov(gradient, momentum, count, decay, BLOCK: tl.constexpr):
    """momentum = decay momentum + gradient; gradient = gradient + decay momentum."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    new = tl.load(gradient + at, inside)
    velocity = decay * tl.load(momentum + at, inside) + new
    tl.store(momentum + at, velocity, inside)
    tl.store(gradient + at, new + decay * velocity, inside)


@triton.jit
def descend(parameter, direction, count, rate, shrink, BLOCK: tl.constexpr):
    """parameter = shrink parameter - rate direction."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    tl.store(parameter + at, shrink * tl.load(parameter + at, inside) - rate * tl.load(direction + at, inside), inside)


@triton.jit
def adamw(parameter, gradient, mean, square, count, beta1, beta2, rest1, rest2, eps, rate, shrink, BLOCK: tl.constexpr):
    """Both moments, then parameter = shrink parameter - rate mean / (sqrt(square) + eps); rest1 = 1 - beta1 and rest2 = 1 - beta2.

    Roots and quotients are exact: the fast ones take the smallest squares for zeros, over which only eps would then stand.
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    new = tl.load(gradient + at, inside, 0.0)
    first = beta1 * tl.load(mean + at, inside, 0.0) + rest1 * new
    second = beta2 * tl.load(square + at, inside, 0.0) + rest2 * new * new
    tl.store(mean + at, first, inside)
    tl.store(square + at, second, inside)
    step = tl.div_rn(first, tl.sqrt_rn(second) + eps)
    tl.store(parameter + at, shrink * tl.load(parameter + at, inside, 0.0) - rate * step, inside)
