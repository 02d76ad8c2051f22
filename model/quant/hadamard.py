"""The orthonormal Walsh-Hadamard transform of the last dimension."""

from __future__ import annotations

import torch
from torch import Tensor

_CPU_ELEMENTS, _DEVICE_ELEMENTS = 1 << 17, 1 << 26
"""Elements transformed at a time; on a CPU such a piece stays in the second-level cache."""


def hadamard(x: Tensor) -> Tensor:
    """Multiply by the symmetric orthonormal matrix H_K, H_2n = [[H_n, H_n], [H_n, -H_n]] / sqrt(2), in fp32.

    It spreads single large components over all of them, so that few bits lose less; products of two transformed vectors are those of the
    vectors. K log2(K) additions, no matrix; every row is computed alike whatever the batch.

    Args:
        x: [..., K] any float dtype, K a power of two.

    Returns:
        Same shape and dtype; differentiable, H is its own inverse and transpose.

    Raises:
        ValueError: K is not a power of two.

    Source: v4_spec 2.2, 2.3.
    """
    width = x.shape[-1]
    if width < 1 or width & (width - 1):
        raise ValueError(f"hadamard: got a width of {width}, expected a power of two")
    return _Hadamard.apply(x)


class _Hadamard(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        width, out = x.shape[-1], torch.empty(x.shape, dtype=x.dtype, device=x.device)
        step = max(1, (_CPU_ELEMENTS if x.device.type == "cpu" else _DEVICE_ELEMENTS) // width)
        for source, target in zip(x.reshape(-1, width).split(step), out.view(-1, width).split(step)):
            target.copy_(_transformed(source))
        return out

    @staticmethod
    def backward(ctx, grad):
        return _Hadamard.apply(grad)


def _transformed(rows: Tensor) -> Tensor:
    """Transform [R, K]; worked on as [K, R], where all butterflies go along contiguous memory."""
    count, width = rows.shape
    x = torch.empty((width, count), device=rows.device).copy_(rows.T)
    half = 1
    while half < width:
        pairs = x.view(width // (2 * half), 2, half, count)
        first, second = pairs[:, 0], pairs[:, 1]
        difference = first - second
        first.add_(second)
        second.copy_(difference)
        half *= 2
    return x.mul_(width**-0.5).T.contiguous()  # before any change of dtype: torch transposes and converts slowly at once
