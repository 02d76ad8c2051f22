"""The start of the residual streams, every one a copy of the embedding, on a GPU: with the kernels that lay tokens out for experts."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.kernels.experts.fused import spread, sum_pairs


class Copies(torch.autograd.Function):
    """[T, D] to [T, M, D], each row read once; the gradient sums M rows in fp32."""

    @staticmethod
    def forward(ctx, x: Tensor, count: int) -> Tensor:
        return spread(x.contiguous(), _slots(len(x) * count, x), count).view(len(x), count, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        tokens, count, _ = grad.shape
        return sum_pairs(grad.contiguous().flatten(0, 1), None, _slots(tokens * count, grad), count), None


def _slots(number: int, like: Tensor) -> Tensor:
    """Number the rows of the streams, [T * M] int64: they stay in the tokens' order."""
    return torch.arange(number, device=like.device)
