"""Sparse attention in plain torch: query blocks against one contiguous block of keys each, so that all arithmetic is matrix products.

A block of queries shares its keys: the tokens its windows reach, the compressed entries of the samples it touches, and a zero
key for the sink, whose score column is overwritten by the sink's logit and which contributes nothing to the values.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.layout import PackedRow

CHUNK = 1 << 24
"""Scores computed at a time; bounds the memory of a long row (64 MiB in fp32)."""


class Inputs(NamedTuple):
    """What a call of sparse attention is given; see `op.sparse_attention`."""

    q: Tensor
    kv: Tensor
    ckv: Tensor | None
    sink: Tensor
    indices: Tensor | None
    row: PackedRow
    ratio: int

    def chunks(self) -> list[tuple[int, int]]:
        """Split the query blocks so that one chunk has at most `CHUNK` scores."""
        a_block = self.q.shape[1] * self.row.block * self.row.keys(self.ratio)
        step = max(1, CHUNK // a_block)
        count = self.row.blocks if self.row.live is None else len(self.row.live)
        return [(first, min(first + step, count)) for first in range(0, count, step)]

    def queries(self, x: Tensor, scale: float, first: int, last: int) -> Tensor:
        """Scale the rows of the blocks of [T, H, K] and lay them out as [n, H * block, K] fp32."""
        if self.row.live is not None:
            part = self.row.padded(x)[self.row.live[first:last]].float().transpose(1, 2)
        else:
            low, high = first * self.row.block, min(last * self.row.block, self.row.length)
            part = x[low:high].float()
            if missing := last * self.row.block - high:
                part = torch.cat([part, part.new_zeros(missing, *part.shape[1:])])
            part = part.view(last - first, self.row.block, *part.shape[1:]).transpose(1, 2)
        out = part.new_empty(part.shape)
        return torch.mul(part, scale, out=out).flatten(1, 2)

    def keys(self, first: int, last: int) -> Tensor:
        """Gather the keys of the blocks, [n, keys, K] fp32."""
        row, width = self.row, self.kv.shape[1]
        begin, end = (first, last) if row.live is None else (0, row.blocks)
        low, high = begin * row.block - row.reach, end * row.block
        stream = self.kv[max(low, 0) : min(high, row.length)].float()
        stream = torch.cat([stream.new_zeros(max(-low, 0), width), stream, stream.new_zeros(max(high - row.length, 0), width)])
        out = stream.new_zeros(last - first, row.keys(self.ratio), width)
        span = row.reach + row.block
        spans = stream.as_strided((end - begin, span, width), (row.block * width, width, 1))
        out[:, :span] = spans if row.live is None else spans[row.live[first:last]]
        if self.ckv is not None and len(self.ckv):
            rows = row.entry_rows(self.ratio, first, last, live=True)
            out[:, span : span + rows.shape[1]] = self.ckv.float().index_select(0, rows.flatten()).view(*rows.shape, width)
        return out

    def probabilities(self, q: Tensor, keys: Tensor, first: int, last: int) -> Tensor:
        """Softmax the scores of the blocks over keys and sink, [n, H * block, keys] fp32."""
        row, heads = self.row, self.q.shape[1]
        if self.indices is None:
            bias = row.bias(self.ratio, first, last, live=True)
        else:
            bias = row.selected_bias(self.ratio, self.indices, first=first, last=last, live=True)
        scores = torch.bmm(q, keys.mT).unflatten(1, (heads, row.block))
        scores.add_(bias.unsqueeze(1).to(scores.dtype))
        column = row.reach + row.block + (row.entries[self.ratio].width if self.ratio else 0)
        scores[..., column] = self.sink.view(1, heads, 1)
        return torch.softmax(scores, -1).flatten(1, 2)

    def forward(self, first: int, last: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and probabilities of the blocks."""
        keys, queries = self.keys(first, last), self.queries(self.q, self.q.shape[2] ** -0.5, first, last)
        return queries, keys, self.probabilities(queries, keys, first, last)


class BlockedAttention(torch.autograd.Function):
    """Forward and backward of `op.sparse_attention`; a row of more than one chunk recomputes its probabilities in the backward."""

    @staticmethod
    def forward(ctx, q, kv, ckv, sink, indices, row, ratio):
        inputs = Inputs(q, kv, ckv, sink, indices, row, ratio)
        ctx.row, ctx.ratio = row, ratio
        out = torch.empty_like(q) if row.live is None else torch.zeros_like(q)
        chunks = inputs.chunks()
        for first, last in chunks:
            queries, keys, weights = inputs.forward(first, last)
            _put(out, torch.bmm(weights, keys), row, first)
        kept = (queries, keys, weights) if len(chunks) == 1 else ()
        ctx.save_for_backward(q, kv, ckv, sink, indices, *kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        q, kv, ckv, sink, indices, *kept = ctx.saved_tensors
        row = ctx.row
        inputs = Inputs(q, kv, ckv, sink, indices, row, ctx.ratio)
        dq, dsink = torch.empty_like(q) if row.live is None else torch.zeros_like(q), torch.zeros_like(sink, dtype=torch.float32)
        dstream = torch.zeros(
            row.reach + row.blocks * row.block, kv.shape[1], device=kv.device, dtype=torch.promote_types(kv.dtype, torch.float32)
        )
        dckv = None if ckv is None else torch.zeros_like(ckv, dtype=dstream.dtype)
        for first, last in inputs.chunks():
            queries, keys, weights = kept or inputs.forward(first, last)
            dout = inputs.queries(grad, 1.0, first, last)
            dscores = torch._softmax_backward_data(torch.bmm(dout, keys.mT), weights, -1, weights.dtype)
            _put(dq, torch.bmm(dscores, keys).mul_(q.shape[2] ** -0.5), row, first)
            dkeys = torch.bmm(weights.mT, dout).baddbmm_(dscores.mT, queries)
            _scatter_keys(inputs, dkeys, dstream, dckv, first)
            column = row.reach + row.block + (row.entries[ctx.ratio].width if ctx.ratio else 0)
            dsink += dscores[..., column].view(last - first, len(sink), row.block).sum((0, 2))
        dkv = dstream[row.reach : row.reach + row.length].to(kv.dtype)
        return dq, dkv, None if dckv is None else dckv.to(ckv.dtype), dsink.to(sink.dtype), None, None, None


def _put(out: Tensor, rows: Tensor, row: PackedRow, first: int) -> None:
    """Write [n, H * block, K] back to the tokens of [T, H, K]."""
    count, _, width = rows.shape
    block = row.block
    part = rows.view(count, out.shape[1], block, width).transpose(1, 2)
    if row.live is not None:
        tokens = (row.live[first : first + count].unsqueeze(1) * block + torch.arange(block, device=out.device)).flatten()
        here = tokens < len(out)
        out.index_copy_(0, tokens[here], part.to(out.dtype).flatten(0, 1)[here])
        return
    whole = min((len(out) - first * block) // block, count)
    low = first * block
    out[low : low + whole * block].view(whole, block, *out.shape[1:]).copy_(part[:whole])
    if whole < count:
        rest = len(out) - low - whole * block
        out[low + whole * block :].copy_(part[whole, :rest])


def _scatter_keys(inputs: Inputs, dkeys: Tensor, dstream: Tensor, dckv: Tensor | None, first: int) -> None:
    """Add the gradients of the gathered keys to the tokens and entries that they came from."""
    row, count = inputs.row, len(dkeys)
    blocks = dstream.view(-1, row.block, dstream.shape[1])
    for piece in range(row.reach // row.block + 1):
        part = dkeys[:, piece * row.block : (piece + 1) * row.block]
        if row.live is None:
            blocks[first + piece : first + piece + count] += part
        else:
            blocks.index_add_(0, row.live[first : first + count] + piece, part.to(blocks.dtype))
    if dckv is not None and len(dckv):
        rows = row.entry_rows(inputs.ratio, first, first + count, live=True)
        span = row.reach + row.block
        dckv.index_add_(0, rows.flatten(), dkeys[:, span : span + rows.shape[1]].reshape(-1, dckv.shape[1]))
