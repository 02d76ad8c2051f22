"""The definitions of the optimizer's element-wise steps, in the dtype of what they change."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class AdamStep:
    """The numbers of one step of Adam.

    Attributes:
        betas: what stays of the mean of gradients, and of that of their squares.
        eps: added to the root of the latter.
        rate: the learning rate, with the correction of both means' start from zero.
        shrink: what weight decay leaves of a parameter.
    """

    betas: tuple[float, float]
    eps: float
    rate: float
    shrink: float


def nesterov_(gradient: Tensor, momentum: Tensor, decay: float) -> None:
    """Compute `op.nesterov_` in plain torch."""
    momentum.mul_(decay).add_(gradient)
    gradient.add_(momentum, alpha=decay)


def descend_(parameter: Tensor, direction: Tensor, rate: float, shrink: float) -> None:
    """Compute `op.descend_` in plain torch."""
    parameter.mul_(shrink).add_(direction, alpha=-rate)


def adamw_(parameter: Tensor, gradient: Tensor, moments: tuple[Tensor, Tensor], step: AdamStep) -> None:
    """Compute `op.adamw_` in plain torch."""
    mean, square = moments
    beta1, beta2 = step.betas
    mean.lerp_(gradient, 1 - beta1)
    square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    parameter.mul_(step.shrink)
    parameter.addcdiv_(mean, square.sqrt().add_(step.eps), value=-step.rate)
