"""Exact full-vocabulary reverse KL of a student against a teacher, from last hidden states and the two heads."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class _ReverseKl(torch.autograd.Function):
    """The loss is a weighted sum, so its gradient is known up to one factor while the logits exist: one pass."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, head: Tensor, teacher: tuple[Tensor, Tensor], weights: Tensor, chunk: int
    ) -> tuple[Tensor, Tensor]:
        teacher_hidden, teacher_head = teacher
        needs_grad = any(ctx.needs_input_grad)
        kl = torch.empty(len(weights), dtype=torch.float32, device=student.device)  # [R]
        grad_student = torch.empty_like(student) if needs_grad else None
        grad_head = torch.zeros_like(head) if needs_grad else None
        for start in range(0, len(weights), chunk):
            rows = slice(start, start + chunk)
            log_p = F.log_softmax(F.linear(student[rows], head).float(), dim=-1)  # [chunk, V]
            log_ratio = log_p - F.log_softmax(F.linear(teacher_hidden[rows], teacher_head).float(), dim=-1)
            p = log_p.exp_()
            kl[rows] = torch.linalg.vecdot(p, log_ratio)
            if grad_student is not None and grad_head is not None:
                log_ratio.sub_(kl[rows, None]).mul_(p).mul_(weights[rows, None])  # dKL/dz_v = p_v (log p_v - log q_v - KL)
                grad_logits = log_ratio.to(head.dtype)
                grad_student[rows] = grad_logits @ head
                grad_head.addmm_(grad_logits.T, student[rows])
        ctx.save_for_backward(grad_student, grad_head)
        ctx.mark_non_differentiable(kl)
        return torch.dot(kl, weights), kl

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _kl: Tensor) -> tuple[Tensor, Tensor, None, None, None]:  # type: ignore[override]
        grad_student, grad_head = ctx.saved_tensors
        return grad_student * grad, grad_head * grad, None, None, None


def reverse_kl(
    student: Tensor, head: Tensor, teacher: tuple[Tensor, Tensor], weights: Tensor, *, chunk: int = 1024
) -> tuple[Tensor, Tensor]:
    """Compute `op.reverse_kl`; the fp32 copies take about 3 * chunk * V * 4 bytes."""
    return _ReverseKl.apply(student, head, teacher, weights.float(), chunk)  # type: ignore[no-untyped-call]
