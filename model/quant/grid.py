"""Two small floating-point formats as grids: their scales, powers of two rounded up, and rounding to nearest even onto them.

A scale is kept as its ue8m0 byte e, which means 2^(e - 127); 255 means NaN. All of it is exponent arithmetic on fp32 bits: exact, the
same on every device, and without log2 or exp2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from model.kernels.choice import implementation_for
from model.quant.blocks import blocked, scale_shape, unblocked, walk

NAN_BYTE = 255
BIAS = 127
_LEAST_BYTE, _FRACTION_BITS, _EXPONENT_MASK = 1, 23, 0x7F800000


@dataclass(frozen=True)
class Grid:
    """The values of a format: multiples of 2^-mantissa_bits of their power of two, no power below 2^least_exponent, up to `largest`.

    Attributes:
        largest: the greatest finite value.
        mantissa_bits: explicit ones.
        least_exponent: of the smallest normal number; below it the spacing stays the same (subnormals).
    """

    largest: float
    mantissa_bits: int
    least_exponent: int


E4M3 = Grid(largest=448.0, mantissa_bits=3, least_exponent=-6)
"""FP8 without infinities. Source: OCP 8-bit floating point specification 1.0."""
E2M1 = Grid(largest=6.0, mantissa_bits=1, least_exponent=0)
"""FP4: 0, .5, 1, 1.5, 2, 3, 4, 6. Source: OCP microscaling formats specification 1.0."""


def scale_bytes(amax: Tensor, largest: float, *, floor: float = 0.0) -> Tensor:
    """Find the least power of two that brings `amax` down to `largest`, 2^ceil(log2(max(amax, floor) / largest)).

    With amax = m 2^a and largest = n 2^b, 1 <= m, n < 2, the exponent is a - b, one more when m > n. It is never below -126: smaller
    scales would make the products subnormal, which some devices flush to zero.

    Args:
        amax: any shape, non-negative, converted to fp32.
        largest: the format's greatest value.
        floor: lower bound of `amax`.

    Returns:
        uint8 of the same shape, ue8m0; `NAN_BYTE` where `amax` is infinite or NaN.

    Source: v4_spec 7; the bound -126 is that of the indexer's scale, v4_spec 2.3.
    """
    fraction, exponent = math.frexp(largest)
    rest = ((1 << _FRACTION_BITS) - 1) - round((2 * fraction - 1) * (1 << _FRACTION_BITS))
    bits = amax.float().clamp_min(floor).view(torch.int32) & 0x7FFFFFFF
    finite = bits < _EXPONENT_MASK
    carried = (bits.clamp_max(_EXPONENT_MASK) + rest) >> _FRACTION_BITS
    return torch.where(finite, (carried - (exponent - 1)).clamp_min(_LEAST_BYTE), NAN_BYTE).to(torch.uint8)


def settle_scales_(scale: Tensor, amax: Tensor, grid: Grid, *, floor: float | None = 0.0) -> None:
    """Write the scale bytes that greatest magnitudes ask for; with `floor` None, keep them and mark as NaN those that are too small."""
    if floor is None:
        scale.masked_fill_(~(amax * powers(scale).reciprocal() <= grid.largest), NAN_BYTE)
    else:
        scale.copy_(scale_bytes(amax, grid.largest, floor=floor))


def powers(scale: Tensor) -> Tensor:
    """Turn ue8m0 bytes (uint8) into fp32 numbers; 255 becomes NaN."""
    return scale.view(torch.float8_e8m0fnu).float()


def round_to_grid_(x: Tensor, grid: Grid) -> Tensor:
    """Round fp32 numbers within the grid's range to the nearest value, ties to even, in place; a zero loses its sign.

    Adding 1.5 * 2^(23 - mantissa_bits) times the number's power of two leaves exactly the wanted bits, and the addition rounds as IEEE 754
    says.
    """
    anchor = (x.view(torch.int32) & _EXPONENT_MASK).view(torch.float32)
    anchor = anchor.clamp_min_(2.0**grid.least_exponent).mul_(1.5 * 2.0 ** (_FRACTION_BITS - grid.mantissa_bits))
    return x.add_(anchor).sub_(anchor)


def groups_on_gpu(x: Tensor, block: tuple[int, int]) -> bool:
    """Say whether the Triton kernels round `x` in these blocks: groups along a row, a power of two long."""
    return block[0] == 1 and not block[1] & (block[1] - 1) and implementation_for(x) == "triton"


@torch.no_grad()
def onto_grid(x: Tensor, grid: Grid, *, block: tuple[int, int], floor: float = 0.0, dtype: torch.dtype | None = None) -> Tensor:
    """Round `x` to what its quantised form stands for, without making that form.

    Args:
        x: [..., N, K] or [K], any float dtype.
        grid: the format.
        block: rows and columns that share a scale; the last block of either may be short.
        floor: of a block's greatest magnitude, see `scale_bytes`.
        dtype: of the result, that of `x` by default.

    Returns:
        The shape of `x`. Blocks with a number that is not finite are NaN throughout.
    """
    if groups_on_gpu(x, block):
        from model.kernels.quant import op  # brings Triton, which a CPU does without

        return op.fake_quantize(x.contiguous(), group=block[1], grid=grid, floor=floor, dtype=dtype)
    out = torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)
    scales = torch.empty(scale_shape(x.shape, block), dtype=torch.uint8, device=x.device)
    for scale, source, target in walk(block, scales, x, out):
        blocks = blocked(source, block)
        settle_scales_(scale, blocks.abs().amax((1, 3)), grid, floor=floor)
        power = powers(scale)[:, None, :, None]
        rounded = round_to_grid_(blocks * power.reciprocal(), grid).mul_(power)
        target.copy_(unblocked(rounded, target.shape))
    return out
