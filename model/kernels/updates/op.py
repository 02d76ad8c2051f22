"""The element-wise parts of an optimizer's step, in place: which implementation runs."""

from __future__ import annotations

import torch
from torch import Tensor

from model.kernels.choice import implementation_for
from model.kernels.updates import reference
from model.kernels.updates.reference import AdamStep

FEW = 1 << 18
"""Of fewer numbers the host launches torch's three or four kernels sooner than one of Triton."""


def nesterov_(gradient: Tensor, momentum: Tensor, decay: float) -> None:
    """Let momentum = decay momentum + gradient, then gradient = gradient + decay momentum.

    Args:
        gradient, momentum: one shape and dtype.
        decay: of the momentum in one step.
    """
    if _in_torch(gradient, momentum):
        reference.nesterov_(gradient, momentum, decay)
        return
    from model.kernels.updates import fused  # brings Triton, which a CPU does without

    fused.nesterov_(gradient, momentum, decay)


def descend_(parameter: Tensor, direction: Tensor, rate: float, shrink: float) -> None:
    """Let parameter = shrink parameter - rate direction.

    Args:
        parameter, direction: one shape and dtype.
        rate: the learning rate.
        shrink: what weight decay leaves of a parameter.
    """
    if _in_torch(parameter, direction):
        reference.descend_(parameter, direction, rate, shrink)
        return
    from model.kernels.updates import fused  # brings Triton, which a CPU does without

    fused.descend_(parameter, direction, rate, shrink)


def adamw_(parameter: Tensor, gradient: Tensor, moments: tuple[Tensor, Tensor], step: AdamStep) -> None:
    """Update Adam's moments m and v, then let parameter = shrink parameter - rate m / (sqrt(v) + eps).

    Args:
        parameter, gradient: one shape and dtype.
        moments: the means of gradients and of their squares, the same.
        step: its numbers.
    """
    if _in_torch(parameter, gradient, *moments):
        reference.adamw_(parameter, gradient, moments, step)
        return
    from model.kernels.updates import fused  # brings Triton, which a CPU does without

    fused.adamw_(parameter, gradient, moments, step)


def _in_torch(*tensors: Tensor) -> bool:
    first = tensors[0]
    alike = all(each.shape == first.shape and each.device == first.device for each in tensors)  # torch says what is wrong where not
    plain = alike and all(each.dtype == torch.float32 and each.is_contiguous() for each in tensors)
    return implementation_for(first) == "reference" or first.numel() < FEW or not plain
