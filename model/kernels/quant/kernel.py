"""Groups of consecutive elements onto the grids of FP8 (e4m3) and MXFP4 (e2m1), scales by exponent arithmetic on fp32 bits."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _places(groups, per_row, width, GROUP: tl.constexpr, GROUPS: tl.constexpr, WHOLE: tl.constexpr, FULL: tl.constexpr):
    """Number this program's groups [GROUPS] and their elements [GROUPS, GROUP], and say which of them exist.

    WHOLE promises that groups fill their rows, so that elements follow one another, FULL that they fill all programs.
    """
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    lane = tl.arange(0, GROUP)
    real = tl.full([GROUPS], True, tl.int1) if FULL else group < groups
    if WHOLE:
        place = group[:, None] * GROUP + lane[None, :]
        inside = tl.broadcast_to(real[:, None], [GROUPS, GROUP])
    else:
        column = (group % per_row * GROUP)[:, None] + lane[None, :]
        place = (group // per_row * width)[:, None] + column
        inside = real[:, None] & (column < width)
    return group, real, place, inside


@triton.jit
def _scale_byte(bits, floor, bound, REST: tl.constexpr, SHIFT: tl.constexpr):
    """Return the ue8m0 byte of each group, int32, 2^ceil(log2(max(amax, floor) / largest)); 255, NaN, where amax reaches `bound`.

    Everything comes as the bits of fp32 numbers, which have their order. With amax = m 2^a and largest = n 2^b the exponent is a - b, one
    more when m > n: the bits of amax plus REST carry then.
    """
    most = tl.maximum(tl.max(bits & 0x7FFFFFFF, 1), floor)
    byte = tl.maximum(((tl.minimum(most, 0x7F800000) + REST) >> 23) - SHIFT, 1)
    return tl.where(most < bound, byte, 255)


@triton.jit
def _scale(x, floor, REST: tl.constexpr, SHIFT: tl.constexpr):
    """Return the scale's byte [GROUPS], and 1 / scale and scale [GROUPS, 1]; NaN for groups with a number that is not finite."""
    byte = _scale_byte(x.to(tl.int32, bitcast=True), floor, 0x7F800000, REST, SHIFT)
    inverse = tl.where(byte < 255, ((254 - byte) << 23).to(tl.float32, bitcast=True), float("nan"))
    power = tl.where(byte < 255, (byte << 23).to(tl.float32, bitcast=True), float("nan"))
    return byte.to(tl.uint8), inverse[:, None], power[:, None]


@triton.jit
def _rounded(x, LEAST: tl.constexpr, ANCHOR: tl.constexpr):
    """Round to the nearest value of the grid, ties to even: adding ANCHOR times the number's power of two leaves the wanted bits."""
    anchor = (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    anchor = tl.maximum(anchor, LEAST) * ANCHOR
    return (x + anchor) - anchor


@triton.jit
def _onto_grid(x, floor, REST: tl.constexpr, SHIFT: tl.constexpr, LEAST: tl.constexpr, ANCHOR: tl.constexpr):
    """Round groups [n, GROUP] of fp32 numbers."""
    _, inverse, power = _scale(x, floor, REST, SHIFT)
    return _rounded(x * inverse, LEAST, ANCHOR) * power


@triton.jit
def quantize_fp8_groups(x, values, scales, groups, per_row, width, floor, REST: tl.constexpr, SHIFT: tl.constexpr,
                        GROUP: tl.constexpr, GROUPS: tl.constexpr, WHOLE: tl.constexpr, FULL: tl.constexpr):  # fmt: skip
    """Write e4m3 values and ue8m0 scales."""
    group, real, place, inside = _places(groups, per_row, width, GROUP, GROUPS, WHOLE, FULL)
    wide = tl.load(x + place, inside, 0.0).to(tl.float32)
    byte, inverse, _ = _scale(wide, floor, REST, SHIFT)
    tl.store(scales + group, byte, real)
    tl.store(values + place, (wide * inverse).to(values.dtype.element_ty), inside)


@triton.jit
def quantize_mxfp4_groups(x, packed, scales, groups, per_row, width, floor, REST: tl.constexpr, SHIFT: tl.constexpr,
                          GROUP: tl.constexpr, GROUPS: tl.constexpr, WHOLE: tl.constexpr, FULL: tl.constexpr):  # fmt: skip
    """Write e2m1 codes, the even column in the low nibble, and ue8m0 scales.

    With P the greater of a number's power of two and the scale, |x| + 1.5 * 2^22 P has round(2 |x| / P), ties to even, in its last bits
    and no division by the scale is needed. Numbers of 2^100 and more count as not finite.
    """
    group, real, place, inside = _places(groups, per_row, width, GROUP, GROUPS, WHOLE, FULL)
    wide = tl.load(x + place, inside, 0.0).to(tl.float32)
    bits = wide.to(tl.int32, bitcast=True)
    byte = _scale_byte(bits, floor, 0x71800000, REST, SHIFT)
    tl.store(scales + group, byte.to(tl.uint8), real)
    power = tl.maximum(bits & 0x7F800000, (byte << 23)[:, None])
    sums = (tl.abs(wide) + (power + 0x0B400000).to(tl.float32, bitcast=True)).to(tl.int32, bitcast=True)
    even, odd = tl.split(tl.reshape((sums & 7) + (sums >> 22), [GROUPS, GROUP // 2, 2]))
    even_sign, odd_sign = tl.split(tl.reshape(bits, [GROUPS, GROUP // 2, 2]))
    codes = even + (odd << 4) - (17 * (2 * byte + 45))[:, None]  # the sum's exponent is that of P, 22 more; 45 with the bit below it
    codes = codes | ((even_sign >> 28) & 0x08) | ((odd_sign >> 24) & 0x80)
    if WHOLE:
        half = group[:, None] * (GROUP // 2) + tl.arange(0, GROUP // 2)[None, :]
        there = tl.broadcast_to(real[:, None], [GROUPS, GROUP // 2])
    else:
        column = (group % per_row * (GROUP // 2))[:, None] + tl.arange(0, GROUP // 2)[None, :]
        half = (group // per_row * (width // 2))[:, None] + column
        there = real[:, None] & (column < width // 2)
    tl.store(packed + half, codes.to(tl.uint8), there)


@triton.jit
def fake_quantize_groups(x, out, groups, per_row, width, floor, REST: tl.constexpr, SHIFT: tl.constexpr, LEAST: tl.constexpr,
                         ANCHOR: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, WHOLE: tl.constexpr,
                         FULL: tl.constexpr):  # fmt: skip
    """Write what the quantised form stands for."""
    _, _, place, inside = _places(groups, per_row, width, GROUP, GROUPS, WHOLE, FULL)
    wide = tl.load(x + place, inside, 0.0).to(tl.float32)
    tl.store(out + place, _onto_grid(wide, floor, REST, SHIFT, LEAST, ANCHOR).to(out.dtype.element_ty), inside)


@triton.jit
def fake_quantize_tiles(x, by_rows, by_columns, height, width, floor, REST: tl.constexpr, SHIFT: tl.constexpr, LEAST: tl.constexpr,
                        ANCHOR: tl.constexpr, GROUP: tl.constexpr, SIDE: tl.constexpr):  # fmt: skip
    """Write what the quantised forms of a tile [SIDE, SIDE] stand for, in groups along its rows and in groups along its columns."""
    row = tl.program_id(0).to(tl.int64) * SIDE + tl.arange(0, SIDE)
    column = tl.program_id(1) * SIDE + tl.arange(0, SIDE)
    place = row[:, None] * width + column[None, :]
    inside = (row < height)[:, None] & (column < width)[None, :]
    wide = tl.load(x + place, inside, 0.0).to(tl.float32)
    along = _onto_grid(tl.reshape(wide, [SIDE * SIDE // GROUP, GROUP]), floor, REST, SHIFT, LEAST, ANCHOR)
    tl.store(by_rows + place, tl.reshape(along, [SIDE, SIDE]).to(by_rows.dtype.element_ty), inside)
    turned = tl.reshape(tl.trans(wide), [SIDE * SIDE // GROUP, GROUP])
    across = tl.trans(tl.reshape(_onto_grid(turned, floor, REST, SHIFT, LEAST, ANCHOR), [SIDE, SIDE]))
    tl.store(by_columns + place, across.to(by_columns.dtype.element_ty), inside)
