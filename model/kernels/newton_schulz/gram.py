"""Newton-Schulz on Gram matrices: several steps on N x N matrices for one product with the N x M ones.

With G = X X^T a step multiplies X by P = aI + bG + cG^2 and G by P^2. All of them are polynomials of one symmetric matrix: they commute,
and every product among them is symmetric. Rounding errors of G that stand for small singular values would grow without bound, by a^2 a
step, so X and G are made afresh after a few steps. In fp16, whose rounding is an eighth of bf16's, this is closer to the exact iteration
than the usual form in bf16.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

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
    """Compute `op.orthogonalize` for matrices on a GPU."""
    out = torch.empty(matrices.shape, dtype=matrices.dtype, device=matrices.device)
    _orthogonalize([_wide(matrices.contiguous())], [_wide(out)], 1.0)
    return out


def orthogonalize_(matrices: Sequence[Tensor], scale: float) -> None:
    """Compute `op.orthogonalize_` for matrices on a GPU."""
    wide = [_wide(each) for each in matrices]
    _orthogonalize(wide, wide, scale)


def _wide(matrices: Tensor) -> Tensor:
    """View matrices [..., N, M], which are contiguous, as [B, low, high] with low <= high."""
    flat = matrices.view(-1, *matrices.shape[-2:])
    return flat.mT if flat.shape[1] > flat.shape[2] else flat


def _orthogonalize(sources: Sequence[Tensor], targets: Sequence[Tensor], scale: float) -> None:
    """Write `scale` times the orthogonalised sources [B, low, high] to the targets, which may be the same memory.

    So many are iterated at a time that the working memory stays at a few times `AT_ONCE`.
    """
    for portion in _portions(sources, targets):
        size = (sum(len(source) for source, _ in portion), *sources[0].shape[1:])
        x = torch.empty(size, dtype=torch.float16, device=sources[0].device)
        counts = [len(source) for source, _ in portion]
        for (source, _), piece in zip(portion, x.split(counts), strict=True):
            norm = torch.linalg.vector_norm(source, dim=(1, 2), keepdim=True, dtype=torch.promote_types(source.dtype, torch.float32))
            torch.div(source, norm.clamp_min_(1e-30), out=piece)
        first = 0
        for steps in SEGMENTS:
            x = _segment(x, COEFFICIENTS[first : first + steps])
            first += steps
        factor = torch.full((1, 1, 1), scale, device=x.device)  # fp32, and of x's rank: times a number, x would be rounded to fp16 again
        for (_, target), piece in zip(portion, x.split(counts), strict=True):
            torch.mul(piece, factor, out=target)


def _portions(sources: Sequence[Tensor], targets: Sequence[Tensor]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Cut and gather pairs of batches of one shape so that each portion has at most `AT_ONCE` numbers, or one matrix."""
    most = max(1, AT_ONCE // max(1, sources[0].shape[1] * sources[0].shape[2]))
    portion: list[tuple[Tensor, Tensor]] = []
    for source, target in zip(sources, targets, strict=True):
        for pair in zip(source.split(most), target.split(most), strict=True):
            if sum(len(other) for other, _ in portion) + len(pair[0]) > most:
                yield portion
                portion = []
            portion.append(pair)
    yield portion


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
