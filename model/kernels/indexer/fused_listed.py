"""Launches of `listed.select_entries` on a GPU: one for the scores, one for every round of the selection."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from model.kernels.indexer.kernel_listed import keep_best, score_entries

TILE = {"KEYS": 128, "num_warps": 4}
TILES = 4
"""Tiles of keys a program scores where there are plenty."""
PROGRAMS = 1024
"""Programs that are plenty."""
SPAN = 4096
"""Scores of which one program keeps the best in an early round; the last round takes twice as many. At least four times what it keeps."""

PER_WARP = 512
"""Scores a warp of these programs, which have at most 16."""


def select_entries(q: Tensor, keys: Tensor, weights: Tensor, count: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Compute `listed.select_entries`."""
    (batch, heads, width), entries = q.shape, keys.shape[1]
    scores = torch.empty(batch, entries, device=q.device, dtype=torch.float32)
    tiles = triton.cdiv(entries, TILE["KEYS"])
    together = TILES if tiles * batch >= PROGRAMS * TILES else 1
    score_entries[(triton.cdiv(tiles, together), batch)](
        q.contiguous(), keys, weights.contiguous(), count, scores, keys.stride(0), keys.stride(1), entries, k, heads=heads, width=width,
        HEADS=max(16, triton.next_power_of_2(heads)), WIDTH=max(16, triton.next_power_of_2(width)), TILES=together,
        STAGES=min(3, together), **TILE,
    )  # fmt: skip
    return _best(scores, count, k)


def _best(scores: Tensor, count: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Number the `k` highest of the first `count` scores of each row [B, N], in order, and count them."""
    batch, entries = scores.shape
    new: dict[str, Any] = {"device": scores.device, "dtype": torch.int32}
    reached, numbers, first = torch.empty(batch, **new), scores, True
    while True:
        span = max(SPAN, 4 * triton.next_power_of_2(k))
        last = entries <= 2 * span
        block = max(16, triton.next_power_of_2(entries)) if last else span
        blocks = triton.cdiv(entries, block)
        best = torch.empty(batch, blocks * k, **new)
        best_scores = scores if last else torch.empty(batch, blocks * k, device=scores.device, dtype=torch.float32)
        keep_best[(blocks, batch)](
            scores, numbers, count, best_scores, best, reached, entries, k, FIRST=first, LAST=last, BLOCK=block,
            num_warps=max(1, min(16, block // PER_WARP)),
        )  # fmt: skip
        if last:
            return best, reached
        scores, numbers, entries, first = best_scores, best, blocks * k, False
