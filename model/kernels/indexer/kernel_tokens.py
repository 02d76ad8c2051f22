"""Rotation in halves of V3.2's index queries and keys, in decoding; see `tokens`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _load(x, weight, bias, lane, mean, inverse, KEY: tl.constexpr):
    """Load some channels, those of a KEY normalised."""
    v = tl.load(x + lane).to(tl.float32)
    if KEY:
        v = (v - mean) * inverse * tl.load(weight + lane).to(tl.float32) + tl.load(bias + lane).to(tl.float32)
    return v


@triton.jit
def turn_halves(x, weight, bias, out, positions, turns, stride, apart, eps,
                WIDTH: tl.constexpr, HALF: tl.constexpr, KEY: tl.constexpr):  # fmt: skip
    """Rotate the first 2 HALF of the channels of one row's head, where channel i pairs with i + HALF; a KEY is layer-normalised first.

    Args:
        x: [B, H, WIDTH], rows `stride` apart. weight, bias: [WIDTH] (KEY). turns: [*, HALF, 2] fp32 by position.
        out: [B, H, WIDTH], rows `apart` apart; with KEY [B, *, WIDTH], each row's one head at its position.
    """
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    position = tl.load(positions + row)
    lane = tl.arange(0, WIDTH)
    x += row * stride + head * WIDTH
    mean, inverse = 0.0, 1.0
    if KEY:
        v = tl.load(x + lane).to(tl.float32)
        mean = tl.sum(v, 0) / WIDTH
        inverse = tl.rsqrt(tl.sum((v - mean) * (v - mean), 0) / WIDTH + eps)
    turned = lane < 2 * HALF
    partner = tl.where(turned, tl.where(lane < HALF, lane + HALF, lane - HALF), lane)
    v, other = _load(x, weight, bias, lane, mean, inverse, KEY), _load(x, weight, bias, partner, mean, inverse, KEY)
    angle = turns + (position * HALF + lane % HALF) * 2
    cos, sin = tl.load(angle, turned, 1.0), tl.load(angle + 1, turned, 0.0)
    v = v * cos + tl.where(lane < HALF, -other, other) * sin
    place = position * WIDTH if KEY else (head * WIDTH).to(tl.int64)
    tl.store(out + row * apart + place + lane, v.to(out.dtype.element_ty))
