"""Newton-Schulz on Gram matrices: several steps on N x N matrices for one product with the N x M ones.

With G = X X^T a step multiplies X by P = aI + bG + cG^2 and G by P^2. All of them are polynomials of one symmetric matrix: they commute,
and every product among them is symmetric. Rounding errors of G that stand for small singular values would grow without bound, by a^2 a
step, so X and G are made afresh after a few steps. In fp16, whose rounding is an eighth of bf16's, this is closer to the exact iteration
than the usual form in bf16.

Matrices of all shapes go through it together, for a host takes longer to launch a small product than a GPU to compute it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

import torch
from torch import Tensor

from model.kernels.newton_schulz import kernel
from model.kernels.newton_schulz.plan import Plan, padded, places, plan
from model.kernels.newton_schulz.reference import COEFFICIENTS

SEGMENTS = (3, 3, 2, 2)
"""Steps between two fresh starts. Segments of 4 steps diverge on some spectra; these do on none that was tried."""
AT_ONCE = 1 << 29
"""Numbers of the matrices that are iterated at a time, zeros around them included; each takes 6 bytes meanwhile, of square matrices 12."""
TILES = {"TILE": 128, "BLOCK": 64, "STAGES": 3, "num_warps": 4}
"""Measured on an H200 over the matrices of `small` and 16 of 2048 x 8192: 16.8 and 18.8 ms; 19.6 and 20.5 with 4 stages and 8 warps."""


def orthogonalize(matrices: Tensor) -> Tensor:
    """Compute `op.orthogonalize` for matrices on a GPU."""
    source = matrices.contiguous()
    out = torch.empty_like(source)
    flat = (each.view(-1, *matrices.shape[-2:]) for each in (source, out))
    for sources, targets in zip(*(_portions([each]) for each in flat), strict=True):
        _orthogonalize(sources, targets, None)
    return out


def orthogonalize_(matrices: Sequence[Tensor], rms: float) -> None:
    """Compute `op.orthogonalize_` for matrices on a GPU."""
    for portion in _portions([each.view(-1, *each.shape[-2:]) for each in matrices]):
        _orthogonalize(portion, portion, rms)


def _portions(batches: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Cut and gather batches [B, N, M] so that each portion has at most `AT_ONCE` numbers, or one matrix."""
    portion: list[Tensor] = []
    room = AT_ONCE
    for batch in batches:
        numbers = prod(padded(batch.shape, TILES["TILE"], TILES["BLOCK"]))
        while len(batch):
            count = min(len(batch), max(room // numbers, 0 if portion else 1))
            if count:
                portion.append(batch[:count])
                batch, room = batch[count:], room - count * numbers
            if len(batch):
                yield portion
                portion, room = [], AT_ONCE
    if portion:
        yield portion


def _orthogonalize(sources: Sequence[Tensor], targets: Sequence[Tensor], rms: float | None) -> None:
    """Write the orthogonalised sources [B, N, M] to the targets, which may be the same memory, or lie as the sources do.

    Args:
        sources: contiguous.
        targets: the same.
        rms: the root mean square of what is written; None to scale nothing.
    """
    assert all(each.is_contiguous() and each.dtype == sources[0].dtype for each in sources), "the kernels count numbers from the first"
    tile, block = TILES["TILE"], TILES["BLOCK"]
    lowest = min(range(len(sources)), key=lambda i: sources[i].data_ptr())
    source, target = sources[lowest], targets[lowest]
    offsets = tuple((each.data_ptr() - source.data_ptr()) // source.itemsize for each in sources)
    layout = plan(tuple(tuple(each.shape) for each in sources), tile, block, source.device)
    begins, aligned = places(layout, offsets)
    x = torch.empty(layout.numbers, dtype=torch.float16, device=source.device)
    squares, norm = (torch.empty(count, dtype=torch.float32, device=source.device) for count in (len(layout.owners), len(begins)))
    tables, pieces = (begins, layout.matrices, layout.owners), (len(layout.owners),)
    cut = {"HIGH": tile, "WIDE": block, "ALIGNED": 4 if aligned else 1, "num_warps": TILES["num_warps"]}
    kernel.sum_squares[pieces](source, *tables, squares, tile * block, cut["ALIGNED"], num_warps=TILES["num_warps"])
    kernel.norms[(len(norm),)](squares, layout.matrices, norm, BLOCK=256)
    kernel.normalise[pieces](source, norm, *tables, x, **cut)
    first = 0
    for steps in SEGMENTS:
        x = _segment(layout, x, COEFFICIENTS[first : first + steps])
        first += steps
    kernel.put_back[pieces](x, *tables, target, 1.0 if rms is None else rms, SCALE=rms is not None, **cut)


def _segment(layout: Plan, x: Tensor, steps: list[tuple[float, float, float]]) -> Tensor:
    """Make some steps from X on: with P = aI + P', Q' = aQ + P'Q and G' = P P G, in the end X = Q X."""
    products = layout.products
    gram = symmetric(layout.grams, x, x, torch.empty(layout.gram_numbers, dtype=x.dtype, device=x.device))
    factor = torch.empty_like(gram)
    for number, (a, b, c) in enumerate(steps):
        rest = torch.empty_like(gram)
        if number:
            symmetric(products, gram, gram, rest, add=gram, alpha=c, beta=b)
            factor = symmetric(products, rest, factor, torch.empty_like(gram), add=factor, beta=a)
        else:
            symmetric(products, gram, gram, rest, add=gram, alpha=c, beta=b, shifted=(factor, a))
        if number < len(steps) - 1:
            half = symmetric(products, rest, gram, torch.empty_like(gram), add=gram, beta=a)
            gram = symmetric(products, rest, half, torch.empty_like(gram), add=half, beta=a)
    out = torch.empty_like(x)
    for group in layout.groups:
        torch.bmm(group.of_grams(factor), group.of_lines(x), out=group.of_lines(out))
    return out


def symmetric(
    table: Tensor,
    a: Tensor,
    b: Tensor,
    out: Tensor,
    *,
    add: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 0.0,
    shifted: tuple[Tensor, float] | None = None,
) -> Tensor:
    """Compute alpha A B^T + beta C of each matrix where the result is symmetric.

    Args:
        table: `Plan.grams` or `Plan.products`.
        a, b: memory of the matrices or of Gram matrices, fp16 or bf16.
        out: memory of Gram matrices, overwritten.
        add: memory of C, symmetric.
        alpha, beta: the factors.
        shifted: further memory of Gram matrices, overwritten with the result plus a number times I, and that number.

    Returns:
        `out`, exactly symmetric.
    """
    second, diagonal = (out, 0.0) if shifted is None else shifted
    kernel.symmetric_product[(len(table),)](
        table, a, b, out if add is None else add, out, second, alpha, beta, diagonal, add is not None, shifted is not None, **TILES
    )
    return out
