"""MXFP4: e2m1 codes two to a byte along K, a power-of-two scale every 32 of K; and the lossless step from it to FP8.

A byte holds the even column in its low nibble and the odd one in its high nibble. As in `fp8`, quantising again reproduces values, and
bytes only where the greatest code of a group is above 3 (else the scale halves and the codes double), unless the scales are handed over.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from model.quant.blocks import blocked, check_scales, look_up, refuse_blocks, scale_shape, unblocked, walk
from model.quant.fp8 import WEIGHT_BLOCK
from model.quant.grid import BIAS, E2M1, NAN_BYTE, groups_on_gpu, powers, round_to_grid_, settle_scales_

GROUP = 32
"""Consecutive elements along K that share a scale. Source: OCP microscaling formats specification 1.0."""
_HEADROOM = 6
"""An FP8 scale is the greatest MXFP4 scale of its block / 2^6: 6 * 2^6 = 384 fits below 448, 2^7 would not. Source: v4_spec 7."""
_FAR = -30
"""Where a distance of exponents stops counting: no code survives it, and nothing becomes subnormal in fp32."""
_E4M3_STEPS = 2.0**9
"""Steps in 1: of the numbers of two significant bits up to 448, e4m3 holds those that are multiples of 2^-9."""
_PAIR_BITS = {torch.bfloat16: torch.int32, torch.float32: torch.int64}


@torch.no_grad()
def quantize_mxfp4(x: Tensor, *, scales: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Quantise to e2m1, to nearest even, with scales 2^ceil(log2(amax / 6)) a group of 32.

    Args:
        x: [..., K] any float dtype, K even; the last group may be short.
        scales: take these (as returned) instead of deriving them, so that a tensor that was read comes out in the same bytes.

    Returns:
        packed: int8 [..., K / 2].
        scales: float8_e8m0fnu [..., ceil(K / 32)].

    Raises:
        ValueError: K is odd, or a number is not finite, or too large for the scales given; names the first groups concerned.

    Source: v4_spec 2.7, 7.
    """
    if x.shape[-1] % 2:
        raise ValueError(f"quantize_mxfp4: got {x.shape[-1]} columns, expected an even number (two to a byte)")
    if scales is None and groups_on_gpu(x, (1, GROUP)):
        from model.kernels.quant import op  # brings Triton, which a CPU does without

        codes, found = op.quantize_mxfp4(x.contiguous(), group=GROUP)
        refuse_blocks(found.view(torch.uint8) == NAN_BYTE, "quantize_mxfp4", "numbers that are not finite")
        return codes, found
    chosen = torch.empty(scale_shape(x.shape, (1, GROUP)), dtype=torch.uint8, device=x.device)
    packed = torch.empty((*x.shape[:-1], x.shape[-1] // 2), dtype=torch.uint8, device=x.device)
    if scales is not None:
        check_scales(scales, tuple(chosen.shape), "quantize_mxfp4")
        chosen.copy_(scales.view(torch.uint8))
    for scale, source, target in walk((1, GROUP), chosen, x, packed):
        groups = blocked(source, (1, GROUP))
        settle_scales_(scale, groups.abs().amax((1, 3)), E2M1, floor=None if scales is not None else 0.0)
        scaled = groups * powers(scale).reciprocal()[:, None, :, None]
        codes = unblocked(_codes(scaled), source.shape)
        torch.bitwise_or(codes[:, 0::2], codes[:, 1::2] << 4, out=target)
    refuse_blocks(chosen == NAN_BYTE, "quantize_mxfp4", "numbers that are not finite or exceed the scales given")
    return packed.view(torch.int8), chosen.view(torch.float8_e8m0fnu)


@torch.no_grad()
def dequantize_mxfp4(packed: Tensor, scales: Tensor, *, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Multiply codes by the scale of their group, exactly wherever `dtype` can hold the product.

    Args:
        packed: [..., K / 2] int8 or uint8.
        scales: [..., ceil(K / 32)] float8_e8m0fnu.
        dtype: of the result.

    Returns:
        [..., K] `dtype`; a group whose scale is NaN is NaN.

    Raises:
        ValueError: the scales have another shape.
    """
    shape = (*packed.shape[:-1], 2 * packed.shape[-1])
    check_scales(scales, scale_shape(shape, (1, GROUP)), "dequantize_mxfp4")
    out = torch.empty(shape, dtype=dtype, device=packed.device)
    for scale, codes, target in walk((1, GROUP), scales, packed.view(torch.uint8), out):
        wide = target if dtype in (torch.bfloat16, torch.float32) else torch.empty_like(target, dtype=torch.float32)
        look_up(_pairs(wide.dtype, str(wide.device)), codes, wide.view(_PAIR_BITS[wide.dtype]))
        _scale_groups_(wide, scale.to(wide.dtype))
        if wide is not target:
            target.copy_(wide)
    return out


def mxfp4_to_fp8(packed: Tensor, scales: Tensor, *, block: tuple[int, int] = WEIGHT_BLOCK) -> tuple[Tensor, Tensor]:
    """Turn MXFP4 into FP8 with a scale a block, without changing any value.

    With S the block's greatest group scale / 2^6, a code c of a group 2^k below that scale becomes c 2^(6 - k). The least code, .5, is a
    multiple of e4m3's least number 2^-9 up to k = 14, and then every other code is one too. So a block fits whenever the scales of its
    groups are at most a factor of 2^14 apart; beyond, it fits if its small groups happen to need no half steps. Groups of zeros do not
    count.

    Args:
        packed: [..., N, K / 2] int8 or uint8.
        scales: [..., N, ceil(K / 32)] float8_e8m0fnu.
        block: rows and columns of an FP8 block, columns a multiple of 32.

    Returns:
        values: float8_e4m3fn [..., N, K].
        scales: float8_e8m0fnu [..., ceil(N / rows), ceil(K / columns)].

    Raises:
        ValueError: a block does not fit (`fits_fp8` says which), a scale is NaN, or shapes contradict each other.

    Source: v4_spec 7; the range is ours, TileKernels asserts 2^11, which stays clear of subnormals.
    """
    values, chosen = _to_fp8(packed, scales, block)
    refuse_blocks(chosen == NAN_BYTE, "mxfp4_to_fp8", "values that FP8 cannot hold exactly (group scales over 2^14 apart, or NaN)")
    return values, chosen.view(torch.float8_e8m0fnu)


def fits_fp8(packed: Tensor, scales: Tensor, *, block: tuple[int, int] = WEIGHT_BLOCK) -> Tensor:
    """Tell which blocks `mxfp4_to_fp8` can convert; arguments as there. Returns bool, one a block."""
    return _to_fp8(packed, scales, block)[1] != NAN_BYTE


@torch.no_grad()
def _to_fp8(packed: Tensor, scales: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Convert; the scale byte of a block that does not fit is `NAN_BYTE`."""
    shape = (*packed.shape[:-1], 2 * packed.shape[-1])
    check_scales(scales, scale_shape(shape, (1, GROUP)), "mxfp4_to_fp8")
    if block[1] % GROUP:
        raise ValueError(f"mxfp4_to_fp8: got blocks of {block[1]} columns, expected a multiple of {GROUP}")
    values = torch.empty(shape, dtype=torch.float8_e4m3fn, device=packed.device)
    chosen = torch.empty(scale_shape(shape, block), dtype=torch.uint8, device=packed.device)
    for scale, target, codes, groups in walk(block, chosen, values, packed.view(torch.uint8), scales.view(torch.uint8)):
        top = _top_exponents(codes, groups, block)
        scale.copy_(torch.where(top == NAN_BYTE, NAN_BYTE, (top - _HEADROOM).clamp_min(1)))
        spread = scale.repeat_interleave(block[0], 0).repeat_interleave(block[1] // GROUP, 1)[: groups.shape[0], : groups.shape[1]]
        distance = (groups.int() - spread.int()).clamp(_FAR, _HEADROOM)
        wide = torch.empty(target.shape, device=target.device)
        look_up(_pairs(wide.dtype, str(wide.device)), codes, wide.view(torch.int64))
        _scale_groups_(wide, powers((distance + BIAS).to(torch.uint8)))
        target.copy_(wide)
        lost = blocked(wide.mul_(_E4M3_STEPS).frac_(), block).abs().amax((1, 3)) > 0
        scale.masked_fill_(lost, NAN_BYTE)
    return values, chosen


def _top_exponents(codes: Tensor, groups: Tensor, block: tuple[int, int]) -> Tensor:
    """Find the greatest scale byte of every block [r, k] among groups [R, G] that hold more than zeros, or a NaN scale; int32."""
    holds = blocked(codes & 0x77, (1, GROUP // 2)).amax((1, 3)) > 0
    counted = torch.where(holds | (groups == NAN_BYTE), groups, 0)
    return blocked(counted, (block[0], block[1] // GROUP)).amax((1, 3)).int()


def _scale_groups_(x: Tensor, scale: Tensor) -> None:
    """Multiply every group of columns of `x` [R, K] by its scale [R, ceil(K / 32)], in place."""
    whole = x.shape[1] // GROUP
    x[:, : whole * GROUP].unflatten(1, (whole, GROUP)).mul_(scale[:, :whole, None])
    if x.shape[1] % GROUP:
        x[:, whole * GROUP :].mul_(scale[:, whole:])


def _codes(scaled: Tensor) -> Tensor:
    """Round fp32 within +-6 to e2m1; returns uint8 codes, sign in bit 3. Times 2^-14, the numbers have them as top bits of a half."""
    halves = round_to_grid_(scaled.abs(), E2M1).copysign_(scaled).mul_(2.0**-14).half().view(torch.int16)
    return (((halves >> 9) & 7) | ((halves >> 12) & 8)).to(torch.uint8)


@cache
def _pairs(dtype: torch.dtype, device: str) -> Tensor:
    """Return the two values of each byte, side by side in memory, as one integer of twice their size [256]."""
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=dtype, device=device)
    byte = torch.arange(256, device=device)
    return torch.stack((values[byte & 15], values[byte >> 4]), 1).view(_PAIR_BITS[dtype]).view(-1)
