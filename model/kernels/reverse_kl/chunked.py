"""Reverse KL in chunks of rows: library matrix products around one kernel that turns logits into their gradients in place."""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.kernels.reverse_kl.kernel import reverse_kl_rows

TEACHER_SHARE = 4
"""The teacher's logits exist for one of so many parts of a chunk at a time: they are needed only once."""

ROWS = {"BLOCK": 2048, "STAGES": 4, "num_warps": 4}


def rows_kl(student: Tensor, teacher: Tensor, weights: Tensor, kl: Tensor, *, write: bool) -> None:
    """Compute each row's KL from logits; with `write`, replace the student's logits by the gradient of the weighted sum.

    Args:
        student, teacher: [R, V] logits, rows contiguous.
        weights: [R] fp32.
        kl: [R] fp32, output.
        write: also overwrite `student`.
    """
    rows, vocabulary = student.shape
    tile = ROWS | {"BLOCK": min(ROWS["BLOCK"], triton.next_power_of_2(vocabulary))}
    reverse_kl_rows[(rows,)](student, teacher, weights, kl, vocabulary, student.stride(0), teacher.stride(0), write, **tile)


class ReverseKl(torch.autograd.Function):
    """The loss is a weighted sum, so its gradient is known up to one factor while the logits exist: one pass."""

    @staticmethod
    def forward(ctx, student, head, teacher_hidden, teacher_head, weights, chunk):
        count, vocabulary = len(student), len(head)
        needs_grad = any(ctx.needs_input_grad)
        step = min(chunk, count)
        part = max(1, -(-step // TEACHER_SHARE))
        kl = torch.empty(count, dtype=torch.float32, device=student.device)
        logits, others = student.new_empty(step, vocabulary), teacher_hidden.new_empty(part, vocabulary)
        grad_student = torch.empty_like(student) if needs_grad else None
        grad_head = (torch.empty_like(head) if count else torch.zeros_like(head)) if needs_grad else None
        for start in range(0, count, max(1, step)):
            rows = slice(start, min(start + step, count))
            some = torch.mm(student[rows], head.T, out=logits[: rows.stop - start])
            for first in range(start, rows.stop, part):
                few = slice(first, min(first + part, rows.stop))
                other = torch.mm(teacher_hidden[few], teacher_head.T, out=others[: few.stop - first])
                rows_kl(some[first - start : few.stop - start], other, weights[few], kl[few], write=needs_grad)
            if grad_student is not None and grad_head is not None:
                torch.mm(some, head, out=grad_student[rows])
                grad_head.addmm_(some.T, student[rows], beta=float(start > 0))
        ctx.save_for_backward(grad_student, grad_head)
        ctx.mark_non_differentiable(kl)
        return torch.dot(kl, weights), kl

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _kl):
        grad_student, grad_head = ctx.saved_tensors
        return grad_student * grad, grad_head * grad, None, None, None, None
