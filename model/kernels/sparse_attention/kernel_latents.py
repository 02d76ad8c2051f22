"""The key that a token of V3.2 leaves in the cache: its normalised latent and its rotated channels.

For benchmarks/bench_gpu_decode.py alone, as `listed.put_latent` and `listed.attend_latents` are.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def put_latent(x, weight, keys, positions, turns, stride, apart, front, eps, VALUES: tl.constexpr, PAIRS: tl.constexpr):
    """Normalise VALUES channels of one row, rotate the 2 PAIRS after them in adjacent pairs, and put both in the row's cache.

    Args:
        x: [B, VALUES + 2 PAIRS], rows `stride` apart. weight: [VALUES]. turns: [*, PAIRS, 2] fp32 by position.
        keys: [B, *, VALUES + 2 PAIRS], rows `apart` apart, written `front` columns after the position.
    """
    row = tl.program_id(0).to(tl.int64)
    position = tl.load(positions + row)
    lane, pair = tl.arange(0, VALUES), tl.arange(0, PAIRS)
    x += row * stride
    keys += row * apart + (front + position) * (VALUES + 2 * PAIRS)
    v = tl.load(x + lane).to(tl.float32)
    v *= tl.rsqrt(tl.sum(v * v, 0) / VALUES + eps) * tl.load(weight + lane).to(tl.float32)
    tl.store(keys + lane, v.to(keys.dtype.element_ty))
    even, odd = tl.load(x + VALUES + 2 * pair).to(tl.float32), tl.load(x + VALUES + 2 * pair + 1).to(tl.float32)
    angle = turns + (position * PAIRS + pair) * 2
    cos, sin = tl.load(angle), tl.load(angle + 1)
    tl.store(keys + VALUES + 2 * pair, (even * cos - odd * sin).to(keys.dtype.element_ty))
    tl.store(keys + VALUES + 2 * pair + 1, (even * sin + odd * cos).to(keys.dtype.element_ty))
