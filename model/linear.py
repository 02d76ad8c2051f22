"""Linear maps of the architecture that are not a plain `nn.Linear`, and the choice of the matrix library on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_TOLERANCE = 1e-6
"""Relative error of an honest fp32 product of the size probed; a product through bf16 is off by 1e-3."""


def linear(inputs: int, outputs: int) -> nn.Linear:
    """Make the architecture's linear map: no bias."""
    return nn.Linear(inputs, outputs, bias=False)


class GroupedLinear(nn.Module):
    """Apply one matrix a group: out[t, g] = x[t, g] @ weight[g]^T, the weights stacked along the outputs.

    Attributes:
        weight: [groups * outputs, inputs], inputs a group.
    """

    def __init__(self, inputs: int, outputs: int, groups: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(groups * outputs, inputs))
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        """Map [T, groups * inputs] to [T, groups * outputs]."""
        weight = self.weight.view(self.groups, -1, self.weight.shape[1])
        parts = x.view(len(x), self.groups, -1).transpose(0, 1)  # [G, T, inputs]
        return torch.bmm(parts, weight.mT).transpose(0, 1).reshape(len(x), -1)


def prefer_onednn() -> bool:
    """Send this process's fp32 matrix products through oneDNN where that changes nothing but the speed.

    torch multiplies fp32 matrices with MKL unless a lower internal precision is allowed; on processors where MKL takes a slow path
    oneDNN is twice as fast. Where the processor has no matrix unit for the lower precision, oneDNN computes in full fp32; a probe makes
    sure of that, and the setting is undone where it does not hold.

    Returns:
        Whether oneDNN is used from now on.
    """
    if not torch.backends.mkldnn.is_available():
        return False
    setting = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = setting.fp32_precision
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(256, 512, generator=generator), torch.randn(512, 256, generator=generator)
    exact = a.double() @ b.double()
    setting.fp32_precision = "bf16"
    honest = all(
        float((f(a, b).double() - exact).norm() / exact.norm()) < _TOLERANCE
        for f in (torch.mm, lambda x, y: torch.bmm(x[None], y[None])[0])
    )
    if not honest:
        setting.fp32_precision = before
    return honest


@contextmanager
def small_products() -> Iterator[None]:
    """Multiply batches of tiny matrices without oneDNN, whose set-up costs more than the arithmetic; undoes nothing else."""
    setting = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = setting.fp32_precision
    setting.fp32_precision = "ieee"
    try:
        yield
    finally:
        setting.fp32_precision = before
