"""The definition of the Newton-Schulz iteration, in the dtype of its input."""

from __future__ import annotations

from torch import Tensor

COEFFICIENTS = [(3.4445, -4.7750, 2.0315)] * 8 + [(2.0, -1.5, 0.5)] * 2
"""Eight steps that grow small singular values quickly, two that settle them at 1. Source: V4 report, section 2.4."""


def orthogonalize(matrices: Tensor) -> Tensor:
    """Replace each matrix by the nearest semi-orthogonal one, up to the hybrid Newton-Schulz iteration's accuracy.

    Args:
        matrices: [..., N, M] float; a batch is iterated together.

    Returns:
        same shape and dtype; singular values within about 1 +- 0.05.

    Source: DeepSeek-V4 report, section 2.4 (X <- aX + b(XX^T)X + c(XX^T)^2 X on X / ||X||_F).
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-30)
    for a, b, c in COEFFICIENTS:
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x
