"""Newton-Schulz on Gram matrices: several steps on N x N matrices for one product with the N x M ones.

With G = X X^T a step multiplies X by P = aI + bG + cG^2 and G by P^2. All of them are polynomials of one symmetric matrix: they commute,
and every product among them is symmetric. Rounding errors of G that stand for small singular values would grow without bound, by a^2 a
step, so X and G are made afresh after a few steps. In fp16, whose rounding is an eighth of bf16's, this is closer to the exact iteration
than the usual form in bf16.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from model.kernels.newton_schulz.kernel import symmetric_product
from model.kernels.newton_schulz.reference import COEFFICIENTS

SEGMENTS = (3, 3, 2, 2)
"""Steps between two fresh starts. Segments of 4 steps diverge on some spectra; these do on none that was tried."""
AT_ONCE = 1 << 28
"""Numbers of the matrices that are iterated at a time."""
TILES = {"TILE": 128, "PAIR": False, "BLOCK": 64, "STAGES": 4, "num_warps": 8}


def orthogonalize(matrices: Tensor) -> Tensor:
    """Compute `op.orthogonalize` for matrices on a GPU, so many at a time that the working memory stays at a few times `AT_ONCE`."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    wide = (matrices.mT if tall else matrices).reshape(-1, min(matrices.shape[-2:]), max(matrices.shape[-2:]))
    out = torch.empty(wide.shape, dtype=matrices.dtype, device=matrices.device)
    each = max(1, AT_ONCE // max(1, wide.shape[1] * wide.shape[2]))
    for some, result in zip(wide.split(each), out.split(each), strict=True):
        norm = torch.linalg.vector_norm(some, dim=(1, 2), keepdim=True, dtype=torch.promote_types(some.dtype, torch.float32))
        x = torch.div(some, norm.clamp_min_(1e-30), out=torch.empty(some.shape, dtype=torch.float16, device=some.device))
        first = 0
        for steps in SEGMENTS:
            x = _segment(x, COEFFICIENTS[first : first + steps])
            first += steps
        result.copy_(x)
    return (out.mT if tall else out).reshape(matrices.shape)


def _segment(x: Tensor, steps: list[tuple[float, float, float]]) -> Tensor:
    """Make some steps from X [B, N, M] on: with P = aI + P', Q' = aQ + P'Q and G' = P P G, in the end X = Q X."""
    gram = factor = symmetric(x, x)
    for number, (a, b, c) in enumerate(steps):
        rest = symmetric(gram, gram, add=gram, alpha=c, beta=b)
        if number:
            factor = symmetric(rest, factor, add=factor, beta=a)
        else:
            factor = rest.clone()
            factor.diagonal(dim1=1, dim2=2).add_(a)
        if number < len(steps) - 1:
            half = symmetric(rest, gram, add=gram, beta=a)
            gram = symmetric(rest, half, add=half, beta=a)
    return torch.bmm(factor, x)


def symmetric(a: Tensor, b: Tensor, *, add: Tensor | None = None, alpha: float = 1.0, beta: float = 0.0) -> Tensor:
    """Compute alpha A B^T + beta C where the result is symmetric.

    Args:
        a, b: [B, N, K] contiguous, fp16 or bf16.
        add: C [B, N, N], symmetric.
        alpha, beta: the factors.

    Returns:
        [B, N, N] in the dtype of `a`, exactly symmetric.
    """
    batch, size, depth = a.shape
    out = torch.empty(batch, size, size, dtype=a.dtype, device=a.device)
    tile, pair = TILES["TILE"], TILES["PAIR"]
    high, wide = triton.cdiv(size, tile), triton.cdiv(size, 2 * tile)
    tiles = wide * (wide + 1) if pair else high * (high + 1) // 2
    full = size % ((1 + pair) * tile) == 0 and depth % TILES["BLOCK"] == 0
    symmetric_product[(tiles, batch)](
        a, b, out if add is None else add, out, size, depth, size * depth, size * size, depth, alpha, beta, add is not None, full, **TILES
    )
    return out
