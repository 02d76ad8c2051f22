"""Choose the compressed entries that each query attends to: which implementation runs."""

from __future__ import annotations

from torch import Tensor

from model.kernels.choice import implementation_for
from model.kernels.indexer import reference
from model.layout import PackedRow


def select(q: Tensor, keys: Tensor, weights: Tensor, *, row: PackedRow, ratio: int, count: int, key_scale: Tensor | None = None) -> Tensor:
    """Select for every query the entries with the highest index score among those it sees.

    I_ts = sum_h w_th ReLU(q_th . k_s) over complete entries s of the query's own sample; ties go to the lower entry. Scores in fp32.

    Args:
        q: [T, H, K] index queries, bf16, fp32, or float8_e4m3fn.
        keys: [C, K] index keys of all samples in order, in the dtype of `q`.
        weights: [T, H] head weights, scale included, that of quantised queries too: it is positive, so ReLU lets it through.
        row: layout of the packed row.
        ratio: tokens an entry.
        count: entries to select.
        key_scale: [C] fp32, positive, what each quantised key is to be multiplied by; None for 1.

    Returns:
        [T, min(count, widest block)] int64 entry numbers within the sample, -1 for none. In which order is up to the implementation: by
        score in plain torch, by number on a GPU.

    Raises:
        ValueError: on a GPU, H or K is no power of two, K is less than 16, or a sample has more entries than a program can hold.

    Source: v4_spec 2.3.
    """
    if implementation_for(q) == "reference":
        return reference.select(q, keys, weights, row=row, ratio=ratio, count=count, key_scale=key_scale)
    from model.kernels.indexer import fused  # brings Triton, which a CPU does without

    return fused.select(q.contiguous(), keys.contiguous(), weights, row=row, ratio=ratio, count=count, key_scale=key_scale)
