"""The key-value grid: FP8 dimensions in tiles of 64 with a scale each, then the rotary dimensions in BF16; and the row of bytes in a cache.

A row of the release, 512 dimensions of which 64 rotate: 448 codes, 128 bytes of BF16, 7 scales, 1 byte of padding, 584 in all. Other widths
follow the same order, their last tile may be short, and their scales are padded to a multiple of 8. A paged cache may keep the scales of
many rows behind their data; that is its own layout.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.quant.fp8 import ACTIVATION_FLOOR, dequantize_fp8, encode_fp8
from model.quant.grid import E4M3, onto_grid

TILE = (1, 64)
"""Dimensions that share a scale. Source: v4_spec 7."""
_SCALES_MULTIPLE = 8


def row_bytes(width: int, rope_dims: int) -> int:
    """Return the bytes of one packed row of `width` dimensions, the last `rope_dims` of them in BF16."""
    scales = -(-(width - rope_dims) // TILE[1])
    return width + rope_dims + -(-scales // _SCALES_MULTIPLE) * _SCALES_MULTIPLE


@torch.no_grad()
def kv_grid(x: Tensor, *, rope_dims: int) -> Tensor:
    """Round `x` [..., K] to what its packed row stands for; same shape and dtype, no gradient of its own.

    Tiles with a number that is not finite are NaN.

    Source: v4_spec 2.1 (window keys), 2.2 (compressed entries), 7.
    """
    rest = _unrotated(x.shape[-1], rope_dims)
    out = torch.empty_like(x)
    out[..., rest:] = x[..., rest:].bfloat16()
    if rest:
        out[..., :rest] = onto_grid(x[..., :rest], E4M3, block=TILE, floor=ACTIVATION_FLOOR)
    return out


@torch.no_grad()
def pack_kv(x: Tensor, *, rope_dims: int) -> Tensor:
    """Write rows of bytes.

    Args:
        x: [..., K] any float dtype.
        rope_dims: last dimensions, kept in BF16.

    Returns:
        uint8 [..., row_bytes(K, rope_dims)].
    """
    rest = _unrotated(x.shape[-1], rope_dims)
    out = torch.zeros((*x.shape[:-1], row_bytes(x.shape[-1], rope_dims)), dtype=torch.uint8, device=x.device)
    data = rest + 2 * rope_dims
    out[..., rest:data] = x[..., rest:].bfloat16().contiguous().view(torch.uint8)
    if rest:
        values, scales = encode_fp8(x[..., :rest], TILE, floor=ACTIVATION_FLOOR)
        out[..., :rest] = values.view(torch.uint8)
        out[..., data : data + scales.shape[-1]] = scales.view(torch.uint8)
    return out


@torch.no_grad()
def unpack_kv(rows: Tensor, width: int, *, rope_dims: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Read what `pack_kv` wrote.

    Args:
        rows: uint8 [..., row_bytes(width, rope_dims)].
        width: dimensions K.
        rope_dims: last dimensions, in BF16.
        dtype: of the result.

    Returns:
        [..., width] `dtype`.

    Raises:
        ValueError: the rows have another number of bytes.
    """
    rest = _unrotated(width, rope_dims)
    if rows.shape[-1] != row_bytes(width, rope_dims):
        raise ValueError(f"unpack_kv: got rows of {rows.shape[-1]} bytes, expected {row_bytes(width, rope_dims)} for {width} dimensions")
    out = torch.empty((*rows.shape[:-1], width), dtype=dtype, device=rows.device)
    data = rest + 2 * rope_dims
    if rope_dims:
        out[..., rest:] = rows[..., rest:data].clone(memory_format=torch.contiguous_format).view(torch.bfloat16)
    if rest:
        scales = rows[..., data : data - (-rest // TILE[1])].view(torch.float8_e8m0fnu)
        out[..., :rest] = dequantize_fp8(rows[..., :rest].view(torch.float8_e4m3fn), scales, block=TILE, dtype=dtype)
    return out


def _unrotated(width: int, rope_dims: int) -> int:
    if not 0 <= rope_dims <= width:
        raise ValueError(f"rope_dims: got {rope_dims}, expected 0 to the width {width}")
    return width - rope_dims
