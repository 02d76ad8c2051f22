"""The definition of sparse attention, one dense matrix of scores a row: for tests, not for speed."""

from __future__ import annotations

import torch
from torch import Tensor

from model.layout import PackedRow


def sparse_attention(
    q: Tensor, kv: Tensor, ckv: Tensor | None, indices: Tensor | None, sink: Tensor, *, row: PackedRow, ratio: int
) -> Tensor:
    """Compute sparse attention as in `op.sparse_attention`, densely."""
    scores = torch.einsum("thk,sk->ths", q.float(), kv.float()) * q.shape[-1] ** -0.5
    place = torch.arange(row.length, device=q.device)
    seen = (row.sample[:, None] == row.sample) & (place <= place[:, None]) & (place > place[:, None] - row.window)
    keys = kv.float()
    if ckv is not None and len(ckv):
        entries = row.entries[ratio]
        number = torch.arange(len(ckv), device=q.device) - entries.base[:, None]
        visible = (number >= 0) & (number < entries.visible[:, None])
        if indices is not None:
            visible &= (number[:, :, None] == indices[:, None, :]).any(-1)
        scores = torch.cat([scores, torch.einsum("thk,ck->thc", q.float(), ckv.float()) * q.shape[-1] ** -0.5], -1)
        seen = torch.cat([seen, visible], -1)
        keys = torch.cat([keys, ckv.float()])
    scores = scores.masked_fill(~seen[:, None, :], float("-inf"))
    scores = torch.cat([scores, sink.float()[None, :, None].expand(len(q), -1, 1)], -1)
    return torch.einsum("ths,sk->thk", scores.softmax(-1)[..., :-1], keys).to(q.dtype)
