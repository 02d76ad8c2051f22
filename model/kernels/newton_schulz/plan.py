"""Where matrices of many shapes lie in working memory, and which part of them each program of the kernels works on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from math import prod

import torch
from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Group:
    """Matrices that are of one size in working memory, next to each other.

    Attributes:
        count, size, depth: [count, size, depth], its Gram matrices [count, size, size].
        lines, grams: where the first begins in either memory.
    """

    count: int
    size: int
    depth: int
    lines: int
    grams: int

    def of_lines(self, flat: Tensor) -> Tensor:
        """View this group's matrices [count, size, depth] in the memory of them all."""
        return flat[self.lines : self.lines + self.count * self.size * self.depth].view(self.count, self.size, self.depth)

    def of_grams(self, flat: Tensor) -> Tensor:
        """View this group's Gram matrices [count, size, size] in the memory of them all."""
        return flat[self.grams : self.grams + self.count * self.size**2].view(self.count, self.size, self.size)


@dataclass(frozen=True, eq=False)
class Plan:
    """The tables of matrices, which lie in working memory with their shorter side first and zeros up to whole tiles and blocks.

    Attributes:
        groups: of the working memory, in its order.
        numbers, gram_numbers: in the working memory of the matrices and of their Gram matrices.
        origins: the batch of each matrix, and where in the batch it begins.
        matrices: [B + 1, 5] int64, each one's first piece, rows, columns outside, and its begin and row length in working memory; the end.
        owners: [P] int32, the matrix of each piece [tile, block] of the working memory.
        grams: [T, 6] int64, `kernel.symmetric_product`'s table for X X^T.
        products: [T, 6] int64, the same for products of Gram matrices.
        aligned: whether all rows and columns outside can be divided by 4.
    """

    groups: tuple[Group, ...]
    numbers: int
    gram_numbers: int
    origins: tuple[tuple[int, int], ...]
    matrices: Tensor
    owners: Tensor
    grams: Tensor
    products: Tensor
    aligned: bool


def padded(shape: Sequence[int], tile: int, block: int) -> tuple[int, int]:
    """Return the size and depth of a matrix [N, M] in working memory."""
    low, high = sorted(shape[-2:])
    return -(-low // tile) * tile, -(-high // block) * block


@lru_cache(maxsize=64)
def plan(shapes: tuple[Shape, ...], tile: int, block: int, device: torch.device) -> Plan:
    """Lay out batches of matrices; the newest plans are kept, for a step is like the one before.

    Args:
        shapes: [..., N, M] of each batch.
        tile, block: of the kernels; block divides tile.
        device: of the tables.
    """
    each = [
        (padded(shape, tile, block), (batch, i * shape[-2] * shape[-1]), shape[-2:])
        for batch, shape in enumerate(shapes)
        for i in range(prod(shape[:-2]))
    ]
    each.sort(key=lambda matrix: matrix[0], reverse=True)
    sizes = [size for size, *_ in each]
    lines = [0, *accumulate(size * depth for size, depth in sizes)]
    grams = [0, *accumulate(size * size for size, _ in sizes)]
    pieces = [(size // tile) * (depth // block) for size, depth in sizes]
    firsts = [0, *accumulate(pieces)]
    first_of = {size: number for number, size in reversed(list(enumerate(sizes)))}
    groups = tuple(Group(sizes.count(size), *size, lines[i], grams[i]) for size, i in sorted(first_of.items(), key=lambda item: item[1]))
    rows = [(firsts[i], *shape, lines[i], sizes[i][1]) for i, (_, _, shape) in enumerate(each)]
    tables = [(lines[i], depth, grams[i], size) for i, (size, depth) in enumerate(sizes)]
    squares = [(grams[i], size, grams[i], size) for i, (size, _) in enumerate(sizes)]
    return Plan(
        groups,
        lines[-1],
        grams[-1],
        tuple(origin for _, origin, _ in each),
        torch.tensor([*rows, (firsts[-1], 0, 0, 0, 0)], device=device),
        torch.arange(len(each), dtype=torch.int32).repeat_interleave(torch.tensor(pieces)).to(device),
        _tiles(tables, tile).to(device),
        _tiles(squares, tile).to(device),
        all(side % 4 == 0 for _, _, shape in each for side in shape),
    )


@lru_cache(maxsize=64)
def places(layout: Plan, offsets: tuple[int, ...]) -> tuple[Tensor, bool]:
    """Find where each matrix begins outside.

    Args:
        layout: of the matrices.
        offsets: where each batch begins, counted in numbers from a common base.

    Returns:
        [B] int64 from that base, and whether these and all rows and columns can be divided by 4.
    """
    begins = [offsets[batch] + inside for batch, inside in layout.origins]
    return torch.tensor(begins, device=layout.owners.device), layout.aligned and all(begin % 4 == 0 for begin in begins)


def _tiles(matrices: list[tuple[int, int, int, int]], tile: int) -> Tensor:
    """Append rows and columns of the lower triangle's tiles to each; the longest sums first, which then do not end alone."""
    table = torch.tensor(sorted(matrices, key=lambda matrix: -matrix[1]))
    high = table[:, 3] // tile
    corners = [torch.tril_indices(int(n), int(n)).T for n in high]
    repeats = table.repeat_interleave(high * (high + 1) // 2, 0)
    return torch.cat([repeats, torch.cat(corners)], 1).contiguous()
