"""The linear maps of the architecture: without bias, and the grouped one of the attention's output."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


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
        parts = zip(x.chunk(self.groups, 1), self.weight.chunk(self.groups))
        return torch.cat([functional.linear(part, weight) for part, weight in parts], 1)
