"""Normalisation: by the root mean square, with and without a weight, and by mean and deviation in V3.2's indexer."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from model.kernels.choice import implementation_for
from model.rope import rotate


def unit_norm(x: Tensor, eps: float, turns: Tensor | None = None) -> Tensor:
    """Divide the last dimension by its root mean square, x * rsqrt(mean(x^2) + eps), computed in fp32; then rotate it if asked to.

    Args:
        x: [..., D] any float dtype.
        eps: added to the mean square.
        turns: what `model.rope.rotate` is to turn the result by.

    Returns:
        [..., D] in the dtype of `x`.

    Source: v4 report 2.3 (query heads), mHC paper (residual streams).
    """
    return rms_norm(x, None, eps, turns=turns)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, *, turns: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """Compute `unit_norm` times `weight` [D], None for ones; into `dtype`, by default that of `x`."""
    if implementation_for(x) == "triton":
        from model.kernels.rotary_norm import fused  # brings Triton, which a CPU does without

        return fused.normalise(x, weight, turns, eps, dtype)
    out = _plain(x.float(), None if weight is None else weight.float(), eps).to(dtype or x.dtype)
    return out if turns is None else rotate(out, turns)


class RMSNorm(nn.Module):
    """Normalise by the root mean square and scale, weight * x * rsqrt(mean(x^2) + eps), in fp32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor, turns: Tensor | None = None, *, dtype: torch.dtype | None = None) -> Tensor:
        """Normalise `x` [..., D], then rotate it by `turns` as `model.rope.rotate` does; same shape, and dtype unless told."""
        return rms_norm(x, self.weight, self.eps, turns=turns, dtype=dtype)


class LayerNorm(nn.LayerNorm):
    """Subtract the mean, divide by the standard deviation, scale and shift, in fp32 whatever the dtypes of input and parameters."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x` [..., D]; same shape and dtype."""
        return functional.layer_norm(x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps).to(x.dtype)


def _plain(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    if torch.is_grad_enabled():
        return _RMSNorm.apply(x, weight, eps)
    return functional.rms_norm(x, x.shape[-1:], weight, eps)


class _RMSNorm(torch.autograd.Function):
    """y = w x r with r = rsqrt(mean(x^2) + eps); dx = r (w dy - x r mean(w dy x r)), in as few passes as plain torch allows."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        inverse = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        unit = x * inverse
        ctx.save_for_backward(unit, inverse, weight)
        return unit if weight is None else unit * weight

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        unit, inverse, weight = ctx.saved_tensors
        product = grad * unit
        dweight = None if weight is None else product.flatten(0, -2).sum(0)
        if weight is not None:
            grad, product = grad * weight, product.mul_(weight)
        along = product.mean(-1, keepdim=True).neg_()
        return torch.addcmul(grad, unit, along).mul_(inverse), dweight, None
