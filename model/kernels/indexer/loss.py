"""The indexer's own loss: its scores, as a distribution over the entries, should match what the attention spends on them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from model.kernels.sparse_attention.blocked import Inputs


class IndexScores(NamedTuple):
    """What index scores are made of: I_ts = sum_h w_th ReLU(q_th . k_s).

    Attributes:
        q: [T, H, K] index queries.
        keys: [C, K] index keys.
        weights: [T, H] head weights, scale included.
    """

    q: Tensor
    keys: Tensor
    weights: Tensor


def indexer_loss(scores: IndexScores, attention: Inputs) -> Tensor:
    """Average KL(p_t || softmax_s(I_ts)) over the queries that see an entry.

    p_ts is what all heads of the attention give entry s together, out of one softmax over window, entries and sink, divided by its sum over
    the entries. With `attention.indices` both distributions are over the selected entries alone, otherwise over all that the query sees.

    Args:
        scores: require grad.
        attention: the queries, keys and selection of the layer's sparse attention; taken as constants.

    Returns:
        [] fp32, nats; 0 where no query sees an entry.

    Source: V3.2 report, eq. 3 (dense warm-up) and 4 (sparse training).
    """
    row, width = attention.row, attention.row.entries[attention.ratio].width
    total, count = scores.weights.new_zeros((), dtype=torch.float32), 0
    if width == 0:
        return total
    q, weights = row.padded(scores.q.float()), row.padded(scores.weights.float())
    for first, last in attention.chunks():
        mass, hidden = _mass(attention, first, last)
        rows = row.entry_rows(attention.ratio, first, last)
        keys = scores.keys.float().index_select(0, rows.flatten()).view(*rows.shape, -1)
        heads = torch.bmm(q[first:last].flatten(1, 2), keys.mT).relu().view(-1, q.shape[2], width)
        index = torch.bmm(weights[first:last].reshape(-1, 1, q.shape[2]), heads).view(last - first, row.block, width)
        total = total + _kl(mass, index, hidden)
        count += int((~hidden).any(-1).sum())
    return total / max(1, count)


@torch.no_grad()
def _mass(attention: Inputs, first: int, last: int) -> tuple[Tensor, Tensor]:
    """Return what the heads of query blocks [first, last) give each entry, summed and normalised, and which entries they do not see."""
    row, begin = attention.row, attention.row.reach + attention.row.block
    width = row.entries[attention.ratio].width
    if attention.indices is None:
        bias = row.bias(attention.ratio, first, last)
    else:
        bias = row.selected_bias(attention.ratio, attention.indices, first=first, last=last)
    hidden = bias[:, :, begin : begin + width].isneginf()
    real = torch.arange(first * row.block, last * row.block, device=bias.device).view(-1, row.block, 1) < row.length
    _, _, weights = attention.forward(first, last)
    mass = weights[..., begin : begin + width].view(last - first, -1, row.block, width).sum(1)
    return mass / mass.sum(-1, keepdim=True).clamp_min(1e-30), hidden | ~real


def _kl(mass: Tensor, index: Tensor, hidden: Tensor) -> Tensor:
    """Sum KL(mass || softmax(index)) over queries; entries that are hidden count on neither side."""
    blind = hidden.all(-1, keepdim=True)  # a softmax over nothing has no gradient
    log_q = index.masked_fill(hidden & ~blind, float("-inf")).log_softmax(-1)
    terms = torch.special.entr(mass).neg() - mass * log_q.masked_fill(hidden, 0.0)
    return terms.masked_fill(hidden, 0.0).sum()
