"""Root-mean-square normalisation, with and without a weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


def unit_norm(x: Tensor, eps: float) -> Tensor:
    """Divide the last dimension by its root mean square, x * rsqrt(mean(x^2) + eps), computed in fp32.

    Args:
        x: [..., D] any float dtype.
        eps: added to the mean square.

    Returns:
        [..., D] in the dtype of `x`.

    Source: v4 report 2.3 (query heads), mHC paper (residual streams).
    """
    return functional.rms_norm(x.float(), (x.shape[-1],), eps=eps).to(x.dtype)


class RMSNorm(nn.Module):
    """Normalise by the root mean square and scale, weight * x * rsqrt(mean(x^2) + eps), in fp32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x` [..., D]; same shape and dtype."""
        return functional.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)
