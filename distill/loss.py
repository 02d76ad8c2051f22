"""On-policy distillation's loss: the exact reverse KL of the student against each sample's teacher."""

from __future__ import annotations

import torch
from torch import Tensor

from model.kernels.reverse_kl.op import reverse_kl as full_vocabulary_reverse_kl
from runtime.objective import Rows


def reverse_kl(rows: Rows, weight: Tensor, *, chunk: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum KL(student || teacher) over a packed row's sampled tokens, over the full vocabulary.

    Args:
        rows: `teacher` holds the teacher's hidden states and head.
        weight: [V, D] the student's head.
        chunk: tokens whose logits exist at once.

    Returns:
        [] fp32 nats, summed; metric `distill/reverse_kl`, summed.

    Source: DeepSeek-V4 report, section 5.1.2, eq. 29.
    """
    assert rows.teacher is not None, "every row of a distillation step names its teacher"
    ones = torch.ones(len(rows.targets), device=weight.device)
    total, _ = full_vocabulary_reverse_kl(rows.hidden, weight, rows.teacher, ones, chunk=chunk)
    return total, {"distill/reverse_kl": total}
