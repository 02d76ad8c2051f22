"""Exact full-vocabulary reverse KL from hidden states and heads: which implementation runs."""

from __future__ import annotations

from torch import Tensor

from model.kernels.choice import implementation_for
from model.kernels.reverse_kl import reference


def reverse_kl(
    student: Tensor, head: Tensor, teacher: tuple[Tensor, Tensor], weights: Tensor, *, chunk: int = 1024
) -> tuple[Tensor, Tensor]:
    """Sum w_r KL(p_r || q_r) over rows, KL(p || q) = sum_v p_v (log p_v - log q_v), p student, q teacher, in fp32.

    Args:
        student: [R, D] the student's last hidden states, requires grad.
        head: [V, D] the student's head.
        teacher: the teacher's last hidden states [R, D'] and head [V, D'], no gradient.
        weights: [R] fp32 weight of each row, no gradient.
        chunk: rows whose logits exist at once; on a GPU 1.25 * chunk * V numbers in the dtype of `student`, and 4096 is a good choice.

    Returns:
        the weighted sum [] fp32, nats, differentiable in `student` and `head`; KL of each row [R] fp32, detached.

    Raises:
        ValueError: the two vocabularies differ in size.

    Source: DeepSeek-V4 report, section 5.1.2, eq. 29.
    """
    if head.shape[0] != teacher[1].shape[0]:
        raise ValueError(f"reverse KL: the student's head has {head.shape[0]} entries, the teacher's {teacher[1].shape[0]}; expected equal")
    if implementation_for(student) == "reference":
        return reference.reverse_kl(student, head, teacher, weights, chunk=chunk)
    from model.kernels.reverse_kl import chunked  # brings Triton, which a CPU does without

    return chunked.ReverseKl.apply(student, head, *teacher, weights.float().contiguous(), chunk)
