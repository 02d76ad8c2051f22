"""The linear maps of the architecture: without bias, and the grouped one of the attention's output."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from model.kernels.choice import implementation_for


def linear(inputs: int, outputs: int) -> nn.Linear:
    """Make the architecture's linear map: no bias."""
    return nn.Linear(inputs, outputs, bias=False)


def wide_product(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply [T, D] by weight [N, D], products and sums in fp32: [T, N] fp32.

    On a GPU half-precision numbers are read as they are, where no gradient is asked for: that product has none.
    """
    half = x.dtype == weight.dtype and x.dtype in (torch.bfloat16, torch.float16)
    if half and x.is_cuda and implementation_for(x) == "triton" and not torch.is_grad_enabled():
        return torch.mm(x, weight.T, out_dtype=torch.float32)
    return functional.linear(x.float(), weight.float())


def stacked_linear(x: Tensor, *maps: nn.Linear) -> Tensor:
    """Apply several maps to one input as a single product: [T, D] to [T, sum of their outputs].

    A GPU reads a wide `x` once, and once more for its gradient, which is summed in the product; stacking the weights costs less.
    """
    return functional.linear(x, torch.cat([each.weight for each in maps]))


def joint_linear(x: Tensor, *maps: nn.Linear) -> tuple[Tensor, ...]:
    """Apply several maps to one input [T, D]; on a GPU as one product, whose parts they return as they lie."""
    if implementation_for(x) == "reference":
        return tuple(each(x) for each in maps)
    return stacked_linear(x, *maps).split([each.out_features for each in maps], 1)


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
        if implementation_for(x) == "triton":
            return _Grouped.apply(x.view(len(x), self.groups, -1), self.weight).flatten(1)
        parts = zip(x.chunk(self.groups, 1), self.weight.chunk(self.groups))
        return torch.cat([functional.linear(part, weight) for part, weight in parts], 1)


class _Grouped(torch.autograd.Function):
    """out[t, g] = x[t, g] @ weight[g]^T as batched products that read and write where the numbers lie: [T, G, I] to [T, G, O].

    Keeps the weight itself, [G * O, I], and no view of it, which would hold its memory when ZeRO 3 drops it between forward and backward.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        by_group = weight.unflatten(0, (x.shape[1], -1))  # [G, O, I]
        out = x.new_empty(len(x), *by_group.shape[:2])
        torch.bmm(x.transpose(0, 1), by_group.mT, out=out.transpose(0, 1))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        dx, by_group = torch.empty_like(x), grad.transpose(0, 1)  # [G, T, O]
        torch.bmm(by_group, weight.unflatten(0, (x.shape[1], -1)), out=dx.transpose(0, 1))
        return dx, torch.bmm(by_group.mT, x.transpose(0, 1)).flatten(0, 1)
