"""Index scores of some query rows at a time, and the exact selection of each row's best; scores stay within the cache of a GPU."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from model.kernels.indexer.kernel import index_scores, select_rows
from model.layout import PackedRow

SCORES = 1 << 24
"""Scores that exist at a time."""
QUERIES = 32
"""Queries a program scores. A packed row's widest block holds for blocks of at least its own size, so this is at most that."""
TILE = {"KEYS": 128, "STAGES": 2, "num_warps": 4}
PRODUCT_COLUMNS = 128
"""Columns (queries times heads) of one product."""
WIDEST = 1 << 16
"""Entries of a row that a program can hold in registers."""


def select(q: Tensor, keys: Tensor, weights: Tensor, *, row: PackedRow, ratio: int, count: int, key_scale: Tensor | None = None) -> Tensor:
    """Compute `op.select` on contiguous inputs.

    Raises:
        ValueError: a sample has more entries than a program can hold, or the heads are not such as tiles are.
    """
    entries, (tokens, heads, width) = row.entries[ratio], q.shape
    if heads & (heads - 1) or width & (width - 1) or width < 16:
        raise ValueError(f"indexer: got {heads} heads of {width} channels, expected powers of two, of channels at least 16")
    if entries.width > WIDEST:
        raise ValueError(f"indexer: got a sample of up to {entries.width} entries, expected at most {WIDEST}")
    out = torch.empty(tokens, min(count, entries.width), dtype=torch.int64, device=q.device)
    if out.numel() == 0:
        return out
    weights, each = weights.float().contiguous(), min(QUERIES, 1 << (row.block.bit_length() - 1))
    tiles = triton.cdiv(entries.width, TILE["KEYS"])
    stride = tiles * TILE["KEYS"]
    step = max(1, SCORES // (stride * each)) * each
    scores = torch.empty(min(step, tokens), stride, dtype=torch.float32, device=q.device)
    places = (entries.base, entries.visible)
    for first in range(0, tokens, step):
        last = min(first + step, tokens)
        block = triton.next_power_of_2(max(1, min(entries.width, last // ratio)))  # no query sees more
        grid = (max(1, min(tiles, triton.cdiv(last // ratio, TILE["KEYS"]))), triton.cdiv(last - first, each))
        index_scores[grid](
            q, keys, weights, weights if key_scale is None else key_scale, *places, scores, first, last, len(keys), stride, count,
            QUERIES=each, HEADS=heads, WIDTH=width, TOGETHER=min(each, max(1, PRODUCT_COLUMNS // heads)), SCALED=key_scale is not None,
            **TILE,
        )  # fmt: skip
        warps = max(1, min(4, block // 512), block // 2048)
        select_rows[(last - first,)](scores, *places, out, first, stride, out.shape[1], QUERIES=each, BLOCK=block, num_warps=warps)
    return out
