"""Launches of the quantisation kernels: what `model.quant`, their reference, computes, in one pass over memory."""

from __future__ import annotations

import math
import struct
from typing import Any

import torch
import triton
from torch import Tensor

from model.kernels.quant.kernel import fake_quantize_groups, fake_quantize_tiles, quantize_fp8_groups, quantize_mxfp4_groups
from model.quant.grid import Grid

ELEMENTS = 4096
"""Elements a program."""
SIDE = 128
"""Rows and columns of a tile that is rounded both ways."""
WARPS, PACKING_WARPS = 4, 2
"""Warps a program; fewer where codes are packed, which is bound by arithmetic: measured on an H200."""


def quantize_fp8(x: Tensor, *, group: int, floor: float = 0.0) -> tuple[Tensor, Tensor]:
    """Quantise to e4m3 in groups along the last dimension; groups with a number that is not finite get a NaN scale.

    Args:
        x: [..., K] float, contiguous.
        group: consecutive elements that share a scale, a power of two.
        floor: lower bound of a group's greatest magnitude.

    Returns:
        values [..., K] float8_e4m3fn, scales [..., ceil(K / group)] float8_e8m0fnu.
    """
    values, scales = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device), _scales(x, group)
    _launch(quantize_fp8_groups, (x, values, scales), group=group, floor=floor, **_carry(448.0))
    return values, scales.view(torch.float8_e8m0fnu)


def quantize_mxfp4(x: Tensor, *, group: int = 32) -> tuple[Tensor, Tensor]:
    """Quantise to e2m1, two codes a byte; arguments as `quantize_fp8`, K even. Returns packed int8 [..., K / 2], and scales as there."""
    packed = torch.empty((*x.shape[:-1], x.shape[-1] // 2), dtype=torch.uint8, device=x.device)
    scales = _scales(x, group)
    _launch(quantize_mxfp4_groups, (x, packed, scales), group=group, floor=0.0, warps=PACKING_WARPS, **_carry(6.0))
    return packed.view(torch.int8), scales.view(torch.float8_e8m0fnu)


def fake_quantize(x: Tensor, *, group: int, grid: Grid, floor: float = 0.0, dtype: torch.dtype | None = None) -> Tensor:
    """Round to the values of `grid`; arguments as `quantize_fp8`. Returns the shape of `x`, its dtype by default."""
    out = torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)
    _launch(fake_quantize_groups, (x, out), group=group, floor=floor, **_carry(grid.largest), **_steps(grid))
    return out


def fake_quantize_both(x: Tensor, *, group: int, grid: Grid, floor: float = 0.0) -> tuple[Tensor, Tensor]:
    """Round a matrix in groups along its rows and, from the same read, in groups along its columns: what the two products of a layer see.

    Args:
        x: [N, K] float, contiguous.
        group: consecutive elements that share a scale, a power of two up to `SIDE`.
        grid: the format.
        floor: lower bound of a group's greatest magnitude.

    Returns:
        two [N, K] in the dtype of `x`: groups of a row, groups of a column.
    """
    assert x.is_contiguous() and x.ndim == 2 and group <= SIDE
    rows, columns = torch.empty_like(x), torch.empty_like(x)
    height, width = x.shape
    bits = struct.unpack("<i", struct.pack("<f", floor))[0]
    if x.numel():
        fake_quantize_tiles[(triton.cdiv(height, SIDE), triton.cdiv(width, SIDE))](
            x, rows, columns, height, width, bits, GROUP=group, SIDE=SIDE, num_warps=8, **_carry(grid.largest), **_steps(grid)
        )
    return rows, columns


def _steps(grid: Grid) -> dict[str, Any]:
    """Return the grid's least power of two and what, times a number's power of two, leaves its wanted bits."""
    return {"LEAST": 2.0**grid.least_exponent, "ANCHOR": 1.5 * 2.0 ** (23 - grid.mantissa_bits)}


def _scales(x: Tensor, group: int) -> Tensor:
    return torch.empty((*x.shape[:-1], triton.cdiv(x.shape[-1], group)), dtype=torch.uint8, device=x.device)


def _carry(largest: float) -> dict[str, int]:
    """Return what a greatest magnitude's bits need added so that they carry when it takes another power of two, and that power's shift."""
    fraction, exponent = math.frexp(largest)
    return {"REST": ((1 << 23) - 1) - round((2 * fraction - 1) * (1 << 23)), "SHIFT": exponent - 1}


def _launch(kernel, tensors: tuple[Tensor, ...], *, group: int, floor: float, warps: int = WARPS, **constants: Any) -> None:
    x = tensors[0]
    assert x.is_contiguous()
    width = x.shape[-1]
    per_row = triton.cdiv(width, group)
    groups, each = x.numel() // max(width, 1) * per_row, ELEMENTS // group
    bits = struct.unpack("<i", struct.pack("<f", floor))[0]
    if groups:
        whole = width % group == 0
        kernel[(triton.cdiv(groups, each),)](
            *tensors, groups, per_row, width, bits, GROUP=group, GROUPS=each, WHOLE=whole, FULL=whole and groups % each == 0,
            num_warps=warps, **constants,
        )  # fmt: skip
