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


_LOOK = 8
"""Steps between two looks at whether the iteration has settled."""


def normalise(logits: Tensor, iterations: int, eps: float) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Iterate, all tensors [M, M, T]; what the gradient needs comes along.

    Stops where the rest changes nothing: where rows still sum to 1, to two units in the last place, after a column step.

    Returns:
        the result, the softmax it began with, and the divisors of the steps that were made.
    """
    settled = 2 * torch.finfo(logits.dtype).eps
    soft = logits.softmax(1)
    comb = soft + eps
    sums: list[Tensor] = []
    for step in range(2 * iterations - 1):
        total = comb.sum(step % 2, keepdim=True).add_(eps)
        comb.div_(total)
        sums.append(total)
        if step % _LOOK == _LOOK - 1 and float((total - 1).abs().max()) < settled:
            break
    return comb, soft, sums


def normalise_backward(grad: Tensor, comb: Tensor, soft: Tensor, sums: list[Tensor], *, iterations: int) -> Tensor:
    """Return the gradient of the logits, all [M, M, T].

    A step P' = P / s has dP = (dP' - sum(dP' P')) / s, and P = P' s walks back to the step before. Steps that were left out have s = 1,
    but still project the gradient; they too end early, where they change it no more.
    """
    comb, grad = comb.clone(), grad.clone(memory_format=torch.contiguous_format)
    product = torch.empty_like(grad)
    last = 2 * iterations - 2
    for step in reversed(range(len(sums), last + 1)):
        along = torch.mul(grad, comb, out=product).sum(step % 2, keepdim=True)
        grad.sub_(along)
        if step % _LOOK == 0 and step < last and float(along.abs().max()) < torch.finfo(grad.dtype).eps * float(grad.abs().max()):
            break
    for step in reversed(range(len(sums))):
        grad.sub_(torch.mul(grad, comb, out=product).sum(step % 2, keepdim=True)).div_(sums[step])
        comb.mul_(sums[step])
    return torch.mul(soft, grad.sub_((grad * soft).sum(1, keepdim=True)), out=product)


class _Sinkhorn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, iterations: int, eps: float) -> Tensor:
        comb, soft, sums = normalise(logits, iterations, eps)
        ctx.iterations = iterations
        ctx.save_for_backward(comb, soft, *sums)
        return comb.clone() if ctx.needs_input_grad[0] else comb

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        comb, soft, *sums = ctx.saved_tensors
        return normalise_backward(grad, comb, soft, sums, iterations=ctx.iterations), None, None
