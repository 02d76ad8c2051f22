"""Groups of consecutive elements onto the grids of FP8 (e4m3) and MXFP4 (e2m1), scales by exponent arithmetic on fp32 bits."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _places(groups, per_row, width, GROUP: tl.constexpr, GROUPS: tl.constexpr, WHOLE: tl.constexpr):
    """Number this program's groups [GROUPS] and their elements [GROUPS, GROUP], and say which of them exist.

    WHOLE promises that groups fill their rows, so that elements follow one another.
    """
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    lane = tl.arange(0, GROUP)
    real = group < groups
    if WHOLE:
        place = group[:, None] * GROUP + lane[None, :]
        inside = real[:, None] & (lane >= 0)[None, :]
    else:
        column = (group % per_row * GROUP)[:, None] + lane[None, :]
        place = (group // per_row * width)[:, None] + column
        inside = real[:, None] & (column < width)
    return group, real, place, inside


@triton.jit
def _scale(x, floor, REST: tl.constexpr, SHIFT: tl.constexpr):
    """Return the ue8m0 byte of each group, 2^ceil(log2(max(amax, floor) / largest)), and 1 / scale and scale [GROUPS, 1].

    `floor` comes as the bits of an fp32 number: bits of non-negative numbers have their order.

    With amax = m 2^a and largest = n 2^b the exponent is a - b, one more when m > n: the bits of amax plus REST carry then. Groups with a
    number that is not finite get 255, which means NaN.
    """
    bits = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)
    bits = tl.maximum(bits, floor)
    finite = bits < 0x7F800000
    byte = tl.maximum(((tl.minimum(bits, 0x7F800000) + REST) >> 23) - SHIFT, 1)
    inverse = tl.where(finite, ((254 - byte) << 23).to(tl.float32, bitcast=True), float("nan"))
    power = tl.where(finite, (byte << 23).to(tl.float32, bitcast=True), float("nan"))
    return tl.where(finite, byte, 255).to(tl.uint8), inverse[:, None], power[:, None]


@triton.jit
def _rounded(x, LEAST: tl.constexpr, ANCHOR: tl.constexpr):
    """Round to the nearest value of the grid, ties to even: adding ANCHOR times the number's power of two leaves the wanted bits."""
    anchor = (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    anchor = tl.maximum(anchor, LEAST) * ANCHOR
    return (x + anchor) - anchor


@triton.jit
def quantize_fp8_groups(x, values, scales, groups, per_row, width, floor, REST: tl.constexpr, SHIFT: tl.constexpr,
                        GROUP: tl.constexpr, GROUPS: tl.constexpr, WHOLE: tl.constexpr):  # fmt: skip
    """Write e4m3 values and ue8m0 scales."""
    group, real, place, inside = _places(groups, per_row, width, GROUP, GROUPS, WHOLE)
    wide = tl.load(x + place, inside, 0.0).to(tl.float32)
    byte, inverse, _ = _scale(wide, floor, REST, SHIFT)
    tl.store(scales + group, byte, real)
    tl.store(values + place, (wide * inverse).to(values.dtype.element_ty), inside)


@triton.jit
def quantize_mxfp4_groups(x, packed, scales, groups, per_row, width, floor, REST: tl.constexpr, SHIFT: tl.constexpr,
                          GROUP: tl.constexpr, GROUPS: tl.constexpr, WHOLE: tl.constexpr):  # fmt: skip
    """Write e2m1 codes, the even column in the low nibble, and ue8m0 scales."""
    group, real, place, inside = _places(groups, per_row, width, GROUP, GROUPS, WHOLE)
    wide = tl.load(x + place, inside, 0.0).to(tl.float32)
    byte, inverse, _ = _scale(wide, floor, REST, SHIFT)
    tl.store(scales + group, byte, real)
    scaled = wide * inverse
    bits = scaled.to(tl.int32, bitcast=True)
    power = tl.maximum(bits & 0x7F800000, 0x3F800000)
    halves = tl.abs(scaled) + (power + 0x0B400000).to(tl.float32, bitcast=True)  # the sum's last bits count halves of the power of two
    code = ((halves.to(tl.int32, bitcast=True) & 7) + (power >> 22) - 254) | ((bits >> 28) & 8)
    even, odd = tl.split(tl.reshape(code, [GROUPS, GROUP // 2, 2]))
    if WHOLE:
        half = group[:, None] * (GROUP // 2) + tl.arange(0, GROUP // 2)[None, :]
        there = real[:, None] & (tl.arange(0, GROUP // 2) >= 0)[None, :]
    else:
        column = (group % per_row * (GROUP // 2))[:, None] + tl.arange(0, GROUP // 2)[None, :]
        half = (group // per_row * (width // 2))[:, None] + column
        there = real[:, None] & (column < width // 2)
    tl.store(packed + half, (even | (odd << 4)).to(tl.uint8), there)


@triton.jit
def fake_quantize_groups(x, out, groups, per_row, width, floor, REST: tl.constexpr, SHIFT: tl.constexpr, LEAST: tl.constexpr,
                         ANCHOR: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, WHOLE: tl.constexpr):  # fmt: skip
    """Write what the quantised form stands for."""
    _, _, place, inside = _places(groups, per_row, width, GROUP, GROUPS, WHOLE)
    wide = tl.load(x + place, inside, 0.0).to(tl.float32)
    _, inverse, power = _scale(wide, floor, REST, SHIFT)
    rounded = _rounded(wide * inverse, LEAST, ANCHOR) * power
    tl.store(out + place, rounded.to(out.dtype.element_ty), inside)
