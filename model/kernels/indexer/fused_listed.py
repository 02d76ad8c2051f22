"""Launches of `listed.select_entries` on a GPU: one for the scores, one for every round of the selection."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from model.kernels.indexer.kernel_listed import bound_scores, keep_best, score_entries

TILE = {"KEYS": 128, "num_warps": 4}
TILES = 4
"""Tiles of keys a program scores where there are plenty."""
PROGRAMS = 1024
"""Programs that are plenty."""
SPAN, FIRST_SPAN = 4096, 16384
"""Scores of which one program keeps the best in an early round, and in the first where most are out of question; the last round takes up to
twice the former. At least four times what it keeps."""
PER_WARP = 512
"""Scores a warp of these programs, which have at most 16."""


def select_entries(q: Tensor, keys: Tensor, weights: Tensor, count: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Compute `listed.select_entries`."""
    (batch, heads, width), entries = q.shape, keys.shape[1]
    scores = torch.empty(batch, entries, device=q.device, dtype=torch.float32)
    group = _group(entries, k)
    peaks = torch.empty(batch, triton.cdiv(entries, group), device=q.device, dtype=torch.float32) if group else scores
    tiles = triton.cdiv(entries, TILE["KEYS"])
    together = TILES if tiles * batch >= PROGRAMS * TILES else 1
    score_entries[(triton.cdiv(tiles, together), batch)](
        q.contiguous(), keys, weights.contiguous(), count, scores, peaks, keys.stride(0), keys.stride(1), entries, k, heads=heads,
        width=width, HEADS=max(16, triton.next_power_of_2(heads)), WIDTH=max(16, triton.next_power_of_2(width)), TILES=together,
        GROUP=group, STAGES=min(3, together), **TILE,
    )  # fmt: skip
    if not group:
        return _best(scores, count, k)
    bound, groups = torch.empty(batch, device=q.device, dtype=torch.int32), peaks.shape[1]
    block = triton.next_power_of_2(groups)
    bound_scores[(batch,)](peaks, count, bound, groups, k, GROUP=group, BLOCK=block, num_warps=_warps(block))
    return _best(scores, count, k, bound=bound)


def _span(k: int) -> int:
    return max(SPAN, 4 * triton.next_power_of_2(k))


def _group(entries: int, k: int) -> int:
    """Choose how many entries have a peak of their own, so that there are four peaks for each entry wanted; 0 where one round is enough."""
    group = min(TILE["KEYS"], entries // (4 * triton.next_power_of_2(k)))
    return 0 if entries <= 2 * _span(k) or group < 4 else 1 << (group.bit_length() - 1)


def _warps(block: int) -> int:
    return max(1, min(16, block // PER_WARP))


def _best(scores: Tensor, count: Tensor, k: int, bound: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Number the `k` highest of the first `count` scores of each row [B, N], in order, and count them; `bound` as of `bound_scores`."""
    batch, entries = scores.shape
    new: dict[str, Any] = {"device": scores.device, "dtype": torch.int32}
    reached, numbers, first = torch.empty(batch, **new), scores, True
    while True:
        bounded = first and bound is not None
        last = entries <= 2 * _span(k)
        block = max(16, triton.next_power_of_2(entries)) if last else max(FIRST_SPAN if bounded else 0, _span(k))
        blocks = triton.cdiv(entries, block)
        best = torch.empty(batch, blocks * k, **new)
        best_scores = scores if last else torch.empty(batch, blocks * k, device=scores.device, dtype=torch.float32)
        keep_best[(blocks, batch)](
            scores, numbers, count, count if bound is None else bound, best_scores, best, reached, entries, k, FIRST=first, LAST=last,
            BOUNDED=bounded, BLOCK=block, num_warps=_warps(block),
        )  # fmt: skip
        if last:
            return best, reached
        scores, numbers, entries, first = best_scores, best, blocks * k, False
