"""The definition of the Newton-Schulz iteration, in the dtype of its input."""

from __future__ import annotations

import math
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

COEFFICIENTS = [(3.4445, -4.7750, 2.0315)] * 8 + [(2.0, -1.5, 0.5)] * 2
"""Eight steps that grow small singular values quickly, two that settle them at 1. Source: V4 report, section 2.4."""

SMALLEST_NORM = 1e-18
"""What a matrix is divided by at least. Squares of smaller numbers vanish in fp32: their sum would call an idle expert's momentum 0."""

CHUNK = 1 << 17
"""Numbers iterated at a time, so that all ten steps find them in a cache (512 KiB in fp32)."""


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
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(SMALLEST_NORM)
    x = x.reshape(-1, *x.shape[-2:])
    x = torch.cat([_iterate(part) for part in x.split(max(1, CHUNK // x[0].numel()))])
    return (x.mT if tall else x).reshape(matrices.shape)


def orthogonalize_(matrices: Sequence[Tensor], rms: float) -> None:
    """Replace matrices by what `orthogonalize` makes of each, times rms sqrt(max(N, M)); those of one shape are iterated together.

    Args:
        matrices: [..., N, M] float, of any shapes, each overwritten.
        rms: the root mean square of a semi-orthogonal matrix's update.
    """
    shapes: dict[tuple[int, int], list[Tensor]] = {}
    for matrix in matrices:
        wide = matrix.mT if matrix.shape[-2] > matrix.shape[-1] else matrix
        low, high = wide.shape[-2:]
        shapes.setdefault((low, high), []).append(wide)
    for (_, high), members in shapes.items():
        stacked = orthogonalize(torch.cat([w.reshape(-1, *w.shape[-2:]) for w in members])) * (rms * math.sqrt(high))
        for w, piece in zip(members, stacked.split([prod(w.shape[:-2]) for w in members]), strict=True):
            w.copy_(piece.view(w.shape))


def _iterate(x: Tensor) -> Tensor:
    for a, b, c in COEFFICIENTS:
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x
