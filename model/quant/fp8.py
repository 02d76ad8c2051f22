"""FP8 e4m3 with a power-of-two scale a block: 128 x 128 for weights, 1 x 128 for activations.

The bytes depend on the source only through its values. Dequantising and quantising again reproduces every value, but not always every
byte: where the greatest code of a block is exactly 224, the scale that the rule gives for it is half the first one, and the codes double.
Hand `scales` over to reproduce bytes.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from model.quant.blocks import blocked, check_scales, look_up, refuse_blocks, scale_shape, unblocked, walk
from model.quant.grid import E4M3, NAN_BYTE, groups_on_gpu, powers, settle_scales_

WEIGHT_BLOCK, ACTIVATION_BLOCK = (128, 128), (1, 128)
ACTIVATION_FLOOR = 1e-4
"""Lower bound of a block's greatest magnitude where the release quantises activations. Source: v4_spec 7."""


def quantize_fp8(
    x: Tensor, block: tuple[int, int] = WEIGHT_BLOCK, *, floor: float = 0.0, scales: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Quantise to e4m3, to nearest even, with scales 2^ceil(log2(amax / 448)).

    Args:
        x: [..., N, K], or [K] where blocks have one row; any float dtype.
        block: rows and columns that share a scale; the last block of either may be short.
        floor: lower bound of amax.
        scales: take these (as returned) instead of deriving them, so that a tensor that was read comes out in the same bytes.

    Returns:
        values: float8_e4m3fn of the shape of `x`.
        scales: float8_e8m0fnu [..., ceil(N / rows), ceil(K / columns)].

    Raises:
        ValueError: a number is not finite, or too large for the scales given; names the first blocks concerned.

    Source: v4_spec 2.7, 7.
    """
    values, needed = encode_fp8(x, block, floor=floor, scales=scales)
    refuse_blocks(needed.view(torch.uint8) == NAN_BYTE, "quantize_fp8", "numbers that are not finite or exceed the scales given")
    return values, needed


@torch.no_grad()
def encode_fp8(x: Tensor, block: tuple[int, int], *, floor: float = 0.0, scales: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Quantise as `quantize_fp8` does, but mark the blocks that it would refuse by a NaN scale; does not wait for the device."""
    if scales is None and groups_on_gpu(x, block):
        from model.kernels.quant import op  # brings Triton, which a CPU does without

        return op.quantize_fp8(x.contiguous(), group=block[1], floor=floor)
    values = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    chosen = torch.empty(scale_shape(x.shape, block), dtype=torch.uint8, device=x.device)
    if scales is not None:
        check_scales(scales, tuple(chosen.shape), "quantize_fp8")
        chosen.copy_(scales.view(torch.uint8))
    for scale, source, target in walk(block, chosen, x, values):
        blocks = blocked(source, block)
        settle_scales_(scale, blocks.abs().amax((1, 3)), E4M3, floor=None if scales is not None else floor)
        scaled = blocks * powers(scale).reciprocal()[:, None, :, None]
        target.copy_(unblocked(scaled, target.shape))
    return values, chosen.view(torch.float8_e8m0fnu)


@torch.no_grad()
def dequantize_fp8(values: Tensor, scales: Tensor, *, block: tuple[int, int] = WEIGHT_BLOCK, dtype: torch.dtype = torch.float32) -> Tensor:
    """Multiply codes by the scale of their block, exactly wherever `dtype` can hold the product.

    Args:
        values: [..., N, K] or [K] float8_e4m3fn.
        scales: [..., ceil(N / rows), ceil(K / columns)] float8_e8m0fnu, or any float dtype.
        block: rows and columns that share a scale.
        dtype: of the result.

    Returns:
        `dtype` of the shape of `values`; a block whose scale is NaN is NaN.

    Raises:
        ValueError: the scales have another shape.
    """
    check_scales(scales, scale_shape(values.shape, block), "dequantize_fp8")
    out = torch.empty(values.shape, dtype=dtype, device=values.device)
    for scale, codes, target in walk(block, scales, values, out):
        blocks = blocked(_widened(codes), block)
        target.copy_(unblocked(blocks.mul_(scale.float()[:, None, :, None]), target.shape))
    return out


@cache
def _bits() -> Tensor:
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().view(torch.int32)


def _widened(codes: Tensor) -> Tensor:
    """Convert e4m3 to a fresh fp32; torch's own conversion takes 2.8 ns an element on a CPU, the table 0.4."""
    if codes.device.type != "cpu":
        return codes.float()
    out = torch.empty(codes.shape)
    look_up(_bits(), codes.view(torch.uint8), out.view(torch.int32))
    return out
