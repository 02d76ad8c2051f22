"""Sparse attention of packed rows: checks, and the choice of implementation."""

from __future__ import annotations

import logging
from functools import cache

from torch import Tensor

from model.kernels.choice import implementation_for
from model.kernels.sparse_attention.blocked import BlockedAttention
from model.layout import PackedRow

logger = logging.getLogger(__name__)


def sparse_attention(
    q: Tensor, kv: Tensor, ckv: Tensor | None, indices: Tensor | None, sink: Tensor, *, row: PackedRow, ratio: int
) -> Tensor:
    """Attend from every query to its window, to its compressed entries, and to the sink.

    o_th = sum_j exp(s_thj) k_j / (sum_j exp(s_thj) + exp(sink_h)), s_thj = q_th . k_j / sqrt(K), over the keys j of the same
    sample that are among the last `row.window` tokens up to t, and over the selected compressed entries; keys are the values.

    The kernels take heads of a power of two of at least 16 channels. Others, V3.2's 576 among them, are attended to in plain torch, on a
    GPU as on a CPU; the log says so once.

    Args:
        q: [T, H, K] queries of the packed row.
        kv: [T, K] window keys, one head.
        ckv: [C, K] compressed entries of all samples in order, None without a compressor.
        indices: [T, k] int64 selected entries, numbered within the sample, visible ones only, each at most once, -1 for none; None
            selects all.
        sink: [H] logits of the sink.
        row: layout, gives `cu_seqlens`, window and the entries' bounds.
        ratio: tokens a compressed entry, 0 without.

    Returns:
        [T, H, K] in the dtype of `q`; scores and softmax in fp32.

    Raises:
        ValueError: a shape does not fit the row.

    Source: v4 report 2.3; v4_spec 2.4.
    """
    expected = {"q": (row.length, q.shape[1], q.shape[2]), "kv": (row.length, q.shape[2]), "sink": (q.shape[1],)}
    got = {"q": tuple(q.shape), "kv": tuple(kv.shape), "sink": tuple(sink.shape)}
    if ckv is not None:
        expected["ckv"], got["ckv"] = (len(row.entries[ratio].first), q.shape[2]), tuple(ckv.shape)
    if got != expected:
        raise ValueError(f"sparse_attention: got shapes {got}, expected {expected}")
    inputs = (q, kv, ckv, sink, indices, row, ratio if ckv is not None else 0)
    if implementation_for(q) == "reference" or not _has_kernels(q.shape[2]):
        return BlockedAttention.apply(*inputs)
    from model.kernels.sparse_attention import fused  # brings Triton, which a CPU does without

    return fused.FusedAttention.apply(*inputs)


@cache
def _has_kernels(width: int) -> bool:
    """Say whether heads of so many channels have kernels, whose tiles are powers of two wide; log it where they have not."""
    if width >= 16 and not width & (width - 1):
        return True
    logger.warning("sparse attention: heads of %d channels have no Triton kernels and run in plain torch", width)
    return False
