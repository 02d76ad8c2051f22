"""Training on the grids: the forward pass sees what inference will see, the gradient goes straight to the master weights.

The gradient is the identity everywhere. There is no range in which it would have to be stopped: scales are rounded up, so no number is
ever clamped. The release's path is fp32 master -> MXFP4 -> FP8 -> product; the step to FP8 is lossless, so rounding to MXFP4 is all of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.quant.fp8 import ACTIVATION_BLOCK
from model.quant.grid import E2M1, E4M3, onto_grid
from model.quant.hadamard import hadamard
from model.quant.kv import kv_grid
from model.quant.mxfp4 import GROUP


def straight_through(x: Tensor, rounded: Tensor) -> Tensor:
    """Return `rounded`, with d/dx = 1.

    Args:
        x: the numbers before rounding, where the gradient goes, in its dtype.
        rounded: same shape, any float dtype; exactly this is returned, not x + (rounded - x).
    """
    return _StraightThrough.apply(x, rounded)


def fake_quantize_mxfp4(w: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """Round weights to MXFP4's values, scales 2^ceil(log2(amax / 6)) every 32 along the last dimension.

    Args:
        w: [..., K] master weights, e.g. all experts [E, F, D]; the last group may be short.
        dtype: of the result, that of `w` by default; bf16 holds MXFP4 exactly.

    Returns:
        Same shape; equals `dequantize_mxfp4(*quantize_mxfp4(w))`. Groups with a number that is not finite are NaN.

    Source: v4_spec 7 (FP4 QAT of the experts).
    """
    return straight_through(w, onto_grid(w.detach(), E2M1, block=(1, GROUP), dtype=dtype))


def fake_quantize_fp8(
    x: Tensor, block: tuple[int, int] = ACTIVATION_BLOCK, *, floor: float = 0.0, dtype: torch.dtype | None = None
) -> Tensor:
    """Round to FP8's values, scales 2^ceil(log2(max(amax, floor) / 448)) a block.

    Args:
        x: [..., N, K], or [K] where blocks have one row.
        block: rows and columns that share a scale.
        floor: `fp8.ACTIVATION_FLOOR` for activations as the release quantises them.
        dtype: of the result, that of `x` by default.

    Returns:
        Same shape; equals `dequantize_fp8` of `quantize_fp8`. Blocks with a number that is not finite are NaN.

    Source: v4_spec 7.
    """
    return straight_through(x, onto_grid(x.detach(), E4M3, block=block, floor=floor, dtype=dtype))


def fake_quantize_kv(x: Tensor, *, rope_dims: int = 64) -> Tensor:
    """Round window keys or compressed entries [..., K] as the cache keeps them: FP8 in tiles of 64, the last `rope_dims` in BF16.

    Returns:
        Same shape and dtype; equals `unpack_kv(pack_kv(x))`.

    Source: v4_spec 2.1, 2.2.
    """
    return straight_through(x, kv_grid(x.detach(), rope_dims=rope_dims))


def fake_quantize_index(x: Tensor) -> Tensor:
    """Rotate index queries or keys [..., K] by the Hadamard transform and round to MXFP4's values in groups of 32.

    The result stays rotated, as the cache keeps it (`quantize_mxfp4(hadamard(x))`, 68 bytes for 128 dimensions): a product with anything
    rotated alike is the product of the originals. Never mix it with an unrotated side.

    Args:
        x: [..., K], K a power of two.

    Returns:
        Same shape and dtype; the gradient passes the rounding unchanged and is rotated back.

    Source: v4_spec 2.2, 2.3, 7.
    """
    rotated = hadamard(x)
    return straight_through(rotated, onto_grid(rotated.detach(), E2M1, block=(1, GROUP)))


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, rounded):
        ctx.dtype = x.dtype
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx, grad):
        return grad.to(ctx.dtype), None
