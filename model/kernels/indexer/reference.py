"""Scores and selection of the lightning indexer on packed rows, in query blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from model.layout import PackedRow

_LOWEST = -0x7F800001
"""-inf as an integer in the order of the floats."""

CHUNK = 1 << 24
"""Head scores computed at a time; bounds the memory of a long row."""


def top_entries(scores: Tensor, count: int) -> Tensor:
    """Number the `count` highest scores of each row, ties to the lower number.

    Args:
        scores: [..., R] fp32, -inf where there is nothing to choose.
        count: at most R.

    Returns:
        [..., count] int64, -1 where only -inf was left.
    """
    width = scores.shape[-1]
    bits = (scores + 0.0).contiguous().view(torch.int32).to(torch.int64)
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    place = torch.arange(width - 1, -1, -1, device=scores.device)
    key = torch.topk(ordered * width + place, count, dim=-1).values
    number = width - 1 - key.remainder(width)
    return torch.where(key.div(width, rounding_mode="floor") > _LOWEST, number, -1)


def select(q: Tensor, keys: Tensor, weights: Tensor, *, row: PackedRow, ratio: int, count: int, key_scale: Tensor | None = None) -> Tensor:
    """Compute `op.select`; entries by score."""
    entries = row.entries[ratio]
    queries, head_weights = row.padded(q.float()), row.padded(weights.float())
    keys = keys.float() if key_scale is None else keys.float() * key_scale.unsqueeze(1)
    low = (row.padded(entries.base) - entries.start.unsqueeze(1)).unsqueeze(-1)
    high = low + row.padded(entries.visible).unsqueeze(-1)
    entry = torch.arange(entries.width, device=q.device)
    step = max(1, CHUNK // (row.block * q.shape[1] * entries.width))
    found = []
    for first in range(0, row.blocks, step):
        last = min(first + step, row.blocks)
        rows = row.entry_rows(ratio, first, last)
        block_keys = keys.index_select(0, rows.flatten()).view(*rows.shape, -1)
        heads = torch.bmm(queries[first:last].flatten(1, 2), block_keys.mT).relu_().view(-1, q.shape[1], entries.width)
        scores = torch.bmm(head_weights[first:last].reshape(-1, 1, q.shape[1]), heads).view(last - first, row.block, -1)
        scores.masked_fill_((entry < low[first:last]) | (entry >= high[first:last]), float("-inf"))
        numbers = top_entries(scores, min(count, entries.width))
        found.append(torch.where(numbers >= 0, numbers - low[first:last], -1))
    return torch.cat(found).flatten(0, 1)[: row.length]


def select_entries(q: Tensor, keys: Tensor, weights: Tensor, count: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Compute `listed.select_entries`; entries by score."""
    entries = keys.shape[1]
    hidden = torch.arange(entries, device=q.device) >= count.unsqueeze(1)
    heads = torch.bmm(q.float(), keys.float().mT).relu_()
    scores = torch.bmm(weights.float().unsqueeze(1), heads).squeeze(1).masked_fill_(hidden, float("-inf"))
    best = top_entries(scores, min(k, entries)).int()
    return torch.nn.functional.pad(best, (0, k - best.shape[1]), value=-1), count.clamp(max=k)
