"""Launches of the optimizer's element-wise kernels."""

from __future__ import annotations

import triton
from torch import Tensor

from model.kernels.updates import kernel
from model.kernels.updates.reference import AdamStep

BLOCK = 2048
"""Numbers of one program: two 16-byte accesses a thread to each memory."""


def nesterov_(gradient: Tensor, momentum: Tensor, decay: float) -> None:
    """Compute `op.nesterov_` on a GPU."""
    count = gradient.numel()
    kernel.nesterov[(triton.cdiv(count, BLOCK),)](gradient, momentum, count, decay, BLOCK, num_warps=8)


def descend_(parameter: Tensor, direction: Tensor, rate: float, shrink: float) -> None:
    """Compute `op.descend_` on a GPU."""
    count = parameter.numel()
    kernel.descend[(triton.cdiv(count, BLOCK),)](parameter, direction, count, rate, shrink, BLOCK, num_warps=8)


def adamw_(parameter: Tensor, gradient: Tensor, moments: tuple[Tensor, Tensor], step: AdamStep) -> None:
    """Compute `op.adamw_` on a GPU."""
    count = parameter.numel()
    rests = (1 - beta for beta in step.betas)
    kernel.adamw[(triton.cdiv(count, BLOCK),)](
        parameter, gradient, *moments, count, *step.betas, *rests, step.eps, step.rate, step.shrink, BLOCK, num_warps=8
    )
