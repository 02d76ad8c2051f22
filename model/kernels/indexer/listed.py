"""Choose entries of a cache for single queries, what decoding needs: which implementation runs."""

from __future__ import annotations

from torch import Tensor

from model.kernels.choice import implementation_for
from model.kernels.indexer import reference


def select_entries(q: Tensor, keys: Tensor, weights: Tensor, count: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Select for every query the `k` entries of its own cache with the highest index score among the first `count`, all where it has fewer.

    I_bs = sum_h w_bh ReLU(q_bh . k_bs); ties go to the lower entry. Scores in fp32. Shapes depend on shapes alone and nothing waits for
    the host, so that a CUDA graph can hold the call.

    Args:
        q: [B, H, K] index queries.
        keys: [B, N, K] index keys in the dtype of `q`, the last dimension contiguous; rows from `count` on are not read.
        weights: [B, H] head weights, scale included.
        count: [B] int32, entries that are there, at most N.
        k: entries to select, at least 1.

    Returns:
        [B, k] int32 entries, -1 where there are fewer, and [B] int32, how many. In which order is up to the implementation.

    Raises:
        ValueError: a shape does not fit.

    Source: v4_spec 2.3.
    """
    batch, heads, width = q.shape
    got = {"keys": (keys.shape[0], keys.shape[2]), "weights": tuple(weights.shape), "count": tuple(count.shape)}
    expected = {"keys": (batch, width), "weights": (batch, heads), "count": (batch,)}
    if got != expected or k < 1:
        raise ValueError(f"select_entries: got shapes {got} and k = {k}, expected {expected} and at least 1")
    if implementation_for(q) == "reference":
        return reference.select_entries(q, keys, weights, count, k)
    from model.kernels.indexer import fused_listed  # brings Triton, which a CPU does without

    return fused_listed.select_entries(q, keys, weights, count, k)
