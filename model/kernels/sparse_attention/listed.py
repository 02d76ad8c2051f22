"""Attention of single queries to listed rows of a cache, on a GPU: what decoding needs. Nothing waits for the host.

V4 decodes with `attend_listed`; the two for latents are V3.2's, with which benchmarks/bench_gpu_decode.py compares it.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from model.kernels.sparse_attention import kernel_hopper_forward, kernel_latents, kernel_listed
from model.kernels.sparse_attention.kernel_forward import LOG2E
from model.kernels.sparse_attention.launch import GATHERED, PROCESSORS, on_hopper
from model.kernels.static_decode.rows import Rows
from model.norm import RMSNorm

LEAST = 64
"""Rows of a list that are worth a program of their own."""

HEADS, ALL_HEADS = 16, 32
"""Heads of one program at most, of a part of a list and of a whole one: fewer fill more processors, but read each key more often."""

NARROW = {"BLOCK": 64, "STAGES": 3, "num_warps": 4}
"""Tiles of keys up to 128 channels wide."""
WIDE = {"BLOCK": 64, "STAGES": 2, "num_warps": 4}
"""Of wider keys, a part of a list."""
WIDE_WHOLE = {"BLOCK": 64, "STAGES": 2, "num_warps": 8}
"""Of wider keys, whole lists."""
WIDE_FP32 = {"BLOCK": 32, "STAGES": 1, "num_warps": 8}
"""Of wider keys in fp32: for comparison, not for speed."""


def attend_listed(q: Tensor, keys: Tensor, rows: Tensor, count: Tensor, sink: Tensor) -> Tensor:
    """Attend from every query to the rows of `keys` that it lists, and to the sink; keys are the values.

    Few queries with long lists are attended to in parts, which are then put together by their sums of exponentials.

    Args:
        q: [B, H, K], K a power of two.
        keys: [N, K], the caches of all queries one after the other.
        rows: [B, k] int32, the rows that a query lists, first of all.
        count: [B] int32, how many.
        sink: [H] logits.

    Returns:
        [B, H, K] in the dtype of `q`.
    """
    if on_hopper(q, 0) and _parts(q, rows) == 1:
        return _attend_on_hopper(q, keys, rows, count, sink)
    return _attend(q, keys, rows, count, values=q.shape[2], sink=sink, scale=q.shape[2] ** -0.5)


def attend_latents(q: Tensor, keys: Tensor, rows: Tensor, count: Tensor, *, values: int) -> Tensor:
    """Attend as `attend_listed`, but only the first channels of a key are its value, no sink, and queries come scaled.

    Args:
        q: [B, H, K], scaled.
        keys: [N, K]; rows: [B, k] int32; count: [B] int32, all as of `attend_listed`.
        values: channels of a value; a power of two, and so is what is left of K.

    Returns:
        [B, H, values] in the dtype of `q`.

    Source: V3.2 report section 2.1, MQA mode.
    """
    return _attend(q, keys, rows, count, values=values, sink=None, scale=1.0)


def put_latent(x: Tensor, norm: RMSNorm, keys: Tensor, rows: Rows, *, front: int) -> None:
    """Normalise the latent of one key a row, rotate its other channels, and put it in its place.

    Args:
        x: [B, K] projections, latent first, rows any distance apart.
        norm: of the latent.
        keys: [B, columns, K], written `front` columns after each row's position.
        rows: positions and rotations.
        front: columns before the first token's.
    """
    kernel_latents.put_latent[(len(x),)](
        x, norm.weight, keys, rows.positions, rows.turns, x.stride(0), keys.stride(0), front, norm.eps, VALUES=len(norm.weight),
        PAIRS=rows.turns.shape[1], num_warps=4,
    )  # fmt: skip


def _parts(q: Tensor, rows: Tensor) -> int:
    """Count the parts that lists are attended to in, so that all processors have something to do."""
    return max(1, min(triton.cdiv(rows.shape[1], LEAST), PROCESSORS // (len(q) * triton.cdiv(q.shape[1], HEADS))))


def _attend(q: Tensor, keys: Tensor, rows: Tensor, count: Tensor, *, values: int, sink: Tensor | None, scale: float) -> Tensor:
    batch, heads, width = q.shape
    parts, k, half = _parts(q, rows), rows.shape[1], q.element_size() == 2
    tile = NARROW if width <= 128 else WIDE_FP32 if not half else WIDE if parts > 1 else WIDE_WHOLE
    most = ALL_HEADS if parts == 1 and (half or width <= 128) else HEADS
    head_block, block = min(most, max(16, triton.next_power_of_2(heads))), tile["BLOCK"]
    span = triton.cdiv(triton.cdiv(k, parts), block) * block
    parts = triton.cdiv(k, span)
    out = torch.empty(batch, heads, values, device=q.device, dtype=q.dtype)
    partial = out if parts == 1 else torch.empty(batch, parts, heads, values, device=q.device, dtype=torch.float32)
    lse = torch.empty(batch, parts, heads, device=q.device, dtype=torch.float32)
    q, rows, logits = q.contiguous(), rows.contiguous(), q if sink is None else sink
    kernel_listed.attend_part[(batch, triton.cdiv(heads, head_block), parts)](
        q, keys, rows, count, logits, partial, lse, scale * LOG2E.value, k, span, heads=heads, width=width, VALUES=values,
        REST=width - values, HEADS=head_block, WHOLE=parts == 1, HAS_SINK=sink is not None,
        precision="ieee" if q.dtype == torch.float32 else "tf32", **tile,
    )  # fmt: skip
    if parts > 1:
        channels = min(64, values)
        kernel_listed.combine[(batch, heads, values // channels)](
            partial, lse, count, logits, out, k, span, parts, heads=heads, VALUES=values, PARTS=triton.next_power_of_2(parts),
            CHANNELS=channels, HAS_SINK=sink is not None, num_warps=4,
        )  # fmt: skip
    return out


def _attend_on_hopper(q: Tensor, keys: Tensor, rows: Tensor, count: Tensor, sink: Tensor) -> Tensor:
    batch, heads, width = q.shape
    q, out, lse = q.contiguous(), torch.empty_like(q), torch.empty(batch, heads, device=q.device, dtype=torch.float32)
    zeros, total = torch.zeros(batch, device=q.device, dtype=torch.int64), batch * heads // 64
    kernel_hopper_forward.forward[(min(total, PROCESSORS),)](
        q, keys, rows.contiguous(), zeros, zeros, count, sink, out, lse, width**-0.5 * LOG2E.value, batch, 0, total,
        heads=heads, window=0, k=rows.shape[1], kind=GATHERED, num_warps=4,
    )  # fmt: skip
    return out
