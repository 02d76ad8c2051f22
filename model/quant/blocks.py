"""Blocks of a matrix that share a scale, and the walk over large tensors in pieces that keeps the working memory small."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

import torch
from torch import Tensor
from torch.nn import functional

_CPU_ELEMENTS = 1 << 19
"""Elements a piece on a CPU: its few fp32 copies stay within the caches."""
_DEVICE_ELEMENTS = 1 << 26
"""Elements a piece elsewhere: enough to hide the launches, 256 MiB an fp32 copy."""


def scale_shape(shape: Sequence[int], block: tuple[int, int]) -> tuple[int, ...]:
    """Return the shape of the scales of a tensor [..., N, K] or [K]: one a block, the last of a row or column possibly short.

    Raises:
        ValueError: the tensor has no columns, or is a vector while blocks span several rows.
    """
    rows, columns = block
    if not shape or shape[-1] == 0 or (len(shape) == 1 and rows > 1):
        raise ValueError(f"blocks of {rows} x {columns}: got a tensor of shape {tuple(shape)}, expected [..., N, K] with K > 0")
    last = -(-shape[-1] // columns)
    return (last,) if len(shape) == 1 else (*shape[:-2], -(-shape[-2] // rows), last)


def walk(block: tuple[int, int], scales: Tensor, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Go through tensors and their scales together, some rows of blocks at a time.

    Args:
        block: rows and columns of a block.
        scales: [..., ceil(N / rows), k], or [k].
        tensors: [..., N, *] each, or [*]; what is to be written must be contiguous, so that the pieces are views of it.

    Yields:
        The scales [r, k] of some rows of blocks, then of every tensor the rows they cover, [up to r * rows, *].
    """
    shape = (1, *tensors[0].shape)[-2:] if tensors[0].dim() == 1 else tensors[0].shape
    rows, samples = shape[-2], prod(shape[:-2])
    if rows % block[0] == 0:  # no block crosses from one matrix into the next: they are one tall matrix
        rows, samples = rows * samples, 1
    every = -(-rows // block[0])
    scales = scales.reshape(samples, every, scales.shape[-1])
    flat = [tensor.reshape(samples, rows, tensor.shape[-1]) for tensor in tensors]
    elements = _CPU_ELEMENTS if scales.device.type == "cpu" else _DEVICE_ELEMENTS
    step = max(1, elements // (block[0] * shape[-1]))
    for sample in range(samples):
        for first in range(0, every, step):
            covered = slice(first * block[0], (first + step) * block[0])
            yield scales[sample, first : first + step], *(tensor[sample, covered] for tensor in flat)


def blocked(x: Tensor, block: tuple[int, int]) -> Tensor:
    """View the matrix [N, K] as fp32 blocks [n, rows, k, columns], filled up with zeros; the storage of `x` where nothing changes."""
    rows, columns = block
    short = (-x.shape[1] % columns, -x.shape[0] % rows)
    x = x.float()
    if any(short):
        x = functional.pad(x, (0, short[0], 0, short[1]))
    return x.reshape(x.shape[0] // rows, rows, x.shape[1] // columns, columns)


def unblocked(blocks: Tensor, shape: Sequence[int]) -> Tensor:
    """Undo `blocked`: the matrix of that shape, without the filling."""
    return blocks.reshape(blocks.shape[0] * blocks.shape[1], -1)[: shape[0], : shape[1]]


def look_up(table: Tensor, codes: Tensor, out: Tensor) -> None:
    """Write table[codes] to `out`, contiguous; `codes` uint8, as many. The tables hold integers (bits): that path of torch is fast."""
    torch.index_select(table, 0, codes.reshape(-1).int(), out=out.view(-1))


def check_scales(scales: Tensor, expected: tuple[int, ...], name: str) -> None:
    """Raise ValueError where scales do not have the shape that their tensor asks for, or are bytes that mean nothing by themselves."""
    if tuple(scales.shape) != expected:
        raise ValueError(f"{name}: got scales of shape {tuple(scales.shape)}, expected {expected}")
    if not scales.is_floating_point():
        raise ValueError(f"{name}: got scales of type {scales.dtype}, expected torch.float8_e8m0fnu")


def refuse_blocks(bad: Tensor, name: str, reason: str) -> None:
    """Raise ValueError when any block is bad (bool, one a block), with their number and the first three positions."""
    if bad.any():
        first = ", ".join(str(position) for position in bad.nonzero()[:3].tolist())
        raise ValueError(f"{name}: {int(bad.sum())} of {bad.numel()} blocks hold {reason}: {first}")
