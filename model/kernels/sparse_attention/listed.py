"""Attention of single queries to listed rows of a cache, on a GPU: what decoding needs. Nothing waits for the host."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from model.kernels.sparse_attention import kernel_forward, kernel_hopper_forward
from model.kernels.sparse_attention.fused import GATHERED, PROCESSORS, head_block_of, on_hopper, shape_of, tiles_of
from model.kernels.sparse_attention.kernel_forward import LOG2E

LEAST = 128
"""Rows of a list that are worth a program of their own."""

NOTHING = -1e30
"""Logit of a sink that is not there; a part of a list has none."""


def attend_listed(q: Tensor, keys: Tensor, rows: Tensor, count: Tensor, sink: Tensor) -> Tensor:
    """Attend from every query to the rows of `keys` that it lists, and to the sink; keys are the values.

    Few queries with long lists are attended to in parts, which are then put together by their sums of exponentials.

    Args:
        q: [B, H, K].
        keys: [N, K], the caches of all queries one after the other, N >= B * parts.
        rows: [B, k] int32, the rows that a query lists, first of all.
        count: [B] int32, how many.
        sink: [H] logits.

    Returns:
        [B, H, K] in the dtype of `q`.
    """
    batch, heads, width = q.shape
    k = rows.shape[1]
    parts = max(1, min(k // LEAST, PROCESSORS // (batch * triton.cdiv(heads, 64))))
    if parts == 1:
        return _attend(q, keys, rows.contiguous(), count, sink)[0]
    span = triton.cdiv(triton.cdiv(k, parts), 64) * 64
    rows = torch.nn.functional.pad(rows, (0, parts * span - k)).view(batch * parts, span)
    starts = torch.arange(parts, device=q.device, dtype=torch.int32) * span
    count = (count[:, None] - starts).clamp(0, span).flatten()
    out, lse = _attend(q.repeat_interleave(parts, 0), keys, rows, count, torch.full_like(sink, NOTHING))
    lse = torch.cat([lse.view(batch, parts, heads), (sink.float() * LOG2E.value).expand(batch, 1, heads)], 1)
    share = torch.softmax(lse * (1 / LOG2E.value), 1)[:, :-1]
    return torch.einsum("bphk,bph->bhk", out.view(batch, parts, heads, width).float(), share).to(q.dtype)


def _attend(q: Tensor, keys: Tensor, rows: Tensor, count: Tensor, sink: Tensor) -> tuple[Tensor, Tensor]:
    """Return the output and the log2 of the sum of exponentials, [B, H] fp32."""
    batch, heads, width = q.shape
    q, out, lse = q.contiguous(), torch.empty_like(q), torch.empty(batch, heads, device=q.device, dtype=torch.float32)
    zeros = torch.zeros(batch, device=q.device, dtype=torch.int64)
    results = (sink, out, lse, width**-0.5 * LOG2E.value)
    sizes = {"heads": heads, "window": 0, "k": rows.shape[1], "kind": GATHERED}
    if on_hopper(q, 0):
        total = batch * heads // 64
        kernel_hopper_forward.forward[(min(total, PROCESSORS),)](
            q, keys, rows, zeros, zeros, count, *results, batch, 0, total, **sizes, num_warps=4
        )
    else:
        head_block = head_block_of(q)
        arguments = (q, keys, keys, zeros, zeros, rows, zeros, count, *results)
        kernel_forward.forward[(batch, triton.cdiv(heads, head_block))](
            *arguments, head_block=head_block, **{**sizes, **shape_of(q), **tiles_of(q, "forward")}
        )
    return out, lse
