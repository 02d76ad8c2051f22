"""Sinkhorn normalisation with a backward that walks the iterations back from their sums."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def sinkhorn(logits: Tensor, iterations: int, eps: float) -> Tensor:
    """Make M x M matrices nearly doubly stochastic.

    softmax over rows (dim 1) + eps, a column step (dim 0), then `iterations - 1` times a row and a column step, each dividing by its
    sum + eps. T is the last, contiguous dimension, so that every step is a handful of long vector operations.

    Args:
        logits: [M, M, T] fp32 or fp64.
        iterations: at least 1.
        eps: added to the softmax and to every sum.

    Returns:
        [M, M, T] in the dtype of `logits`.

    Source: v4_spec 3; mHC paper 4.3.1 (recomputing backward).
    """
    return _Sinkhorn.apply(logits, iterations, eps)


class _Sinkhorn(torch.autograd.Function):
    """Keep the sums of every step; a step P' = P / s has gradient dP = (dP' - sum(dP' P')) / s, and P = P' s walks back."""

    @staticmethod
    def forward(ctx, logits: Tensor, iterations: int, eps: float) -> Tensor:
        soft = logits.softmax(1)
        comb = soft + eps
        sums = []
        for step in range(2 * iterations - 1):
            total = comb.sum(step % 2, keepdim=True).add_(eps)
            comb.div_(total)
            sums.append(total)
        ctx.save_for_backward(soft, comb, *sums)
        return comb.clone() if ctx.needs_input_grad[0] else comb

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        soft, comb, *sums = ctx.saved_tensors
        comb, grad = comb.clone(), grad.clone(memory_format=torch.contiguous_format)
        for step in reversed(range(len(sums))):
            grad.sub_((grad * comb).sum(step % 2, keepdim=True)).div_(sums[step])
            comb.mul_(sums[step])
        return soft * (grad - (grad * soft).sum(1, keepdim=True)), None, None
