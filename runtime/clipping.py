"""Clipping of ZeRO 1's gradients with one wait for the GPU a step. DeepSpeed 0.19.8's own waits three times for each parameter group."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from runtime.zero_layouts import ContiguousLayout, ShardedLayout

NORM_DTYPE = torch.float64
"""What squares are summed in, as DeepSpeed does."""


def read(tensors: Sequence[Tensor]) -> list[float]:
    """Return the values of [] tensors, which a GPU's host then waits for once."""
    return torch.stack([tensor.double() for tensor in tensors]).tolist() if tensors else []


def all_finite(gradients: list[Tensor]) -> bool:
    """Say whether gradients are finite on all ranks; waits for a GPU."""
    if not gradients:
        return True
    finite = torch.stack(torch._foreach_norm(gradients)).isfinite().all().float()
    if dist.get_world_size() > 1:
        dist.all_reduce(finite, op=dist.ReduceOp.MIN)
    return bool(finite)


@contextmanager
def as_configured(optimizer: Any) -> Iterator[None]:
    """Let DeepSpeed's optimizer load a checkpoint, and have it clip as before: it would clip to the norm that the checkpoint names.

    An optimizer that measures nothing, as at ZeRO 1 here, refuses checkpoints that name one; meanwhile it passes for one that measures.
    """
    before = {name: getattr(optimizer, name) for name in ("clip_grad", "compute_grad_norm") if hasattr(optimizer, name)}
    if "compute_grad_norm" in before:
        optimizer.compute_grad_norm = True
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(optimizer, name, value)


class Clipping:
    """Measures ZeRO 1's gradients and clips them as the optimizer begins: DeepSpeed has by then averaged them and launched their copies.

    There, and only there, the host waits for its GPU: for the norm, and for what is to be read along with it. When it goes on, all that is
    left of the step is the optimizer and DeepSpeed's copies of the masters that it changed. Where the norm is not finite the gradients are
    dropped: the optimizer changes nothing, and DeepSpeed copies the masters as they were.

    Attributes:
        norm: of all gradients of the last step before clipping; infinite or not a number where one of them is, or where no step read any.
        values: what was read along with it.
    """

    def __init__(self, zero: Any, layouts: Mapping[Tensor, ContiguousLayout | ShardedLayout], *, most: float) -> None:
        """Take over from DeepSpeed.

        Args:
            zero: `engine.optimizer` of a DeepSpeed engine at stage 1, told neither to clip nor to measure, around the optimizer that steps.
            layouts: of that optimizer's flat parameters.
            most: largest norm, 0 for any.
        """
        self._zero, self._layouts, self._most = zero, layouts, most
        self._along: Sequence[Tensor] | None = None
        self._scale: Tensor | None = None
        self.norm, self.values = math.nan, list[float]()
        zero.optimizer.register_step_pre_hook(self._before_group)

    @property
    def finite(self) -> bool:
        """Whether the last step's gradients were finite on all ranks."""
        return math.isfinite(self.norm)

    def begin(self, along: Sequence[Tensor]) -> None:
        """Say what [] tensors the next step is to read along with its norm."""
        self._along, self.norm, self.values = along, math.nan, []

    def end(self) -> tuple[list[float], float]:
        """Return `values` and `norm` of the step that began."""
        assert self._along is None, "DeepSpeed skipped a step of which it was not to judge: its optimizer was never called"
        return self.values, self.norm

    def _before_group(self, optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
        """Clip the gradient of the group about to step; ZeRO steps one after the other, the first when no other has begun."""
        flats = [flat for group in optimizer.param_groups for flat in group["params"]]
        if self._along is not None:
            along, self._along = self._along, None
            norm = self._measure(flats)
            # The inverse first, then the product: DeepSpeed's roundings.
            self._scale = 1.0 / torch.clamp((norm + 1e-6) / self._most, min=1.0) if self._most else None
            *self.values, self.norm = read([*along, norm])
        for flat in flats:
            if not self.finite:
                flat.grad = None
            elif self._scale is not None and flat.grad is not None:
                flat.grad.mul_(self._scale)

    def _measure(self, flats: Sequence[Tensor]) -> Tensor:
        """Return the norm [] fp32 of all ranks' gradients, those of the first group flat by now, the others as ZeRO keeps them."""
        groups = [[piece for flat in flats for piece in _pieces(flat, self._layouts[flat])]]
        for index, gradients in self._zero.averaged_gradients.items():
            if index > 0:
                assert gradients is not None, f"group {index} has no gradients left to measure while the first steps"
                groups.append([gradient for gradient in gradients if not getattr(gradient, "_zero_padding", False)])
        squares = torch.stack([_squares(pieces, flats[0]) for pieces in groups])
        if dist.get_world_size() > 1:
            dist.all_reduce(squares)
        return torch.linalg.vector_norm(squares.pow(0.5))


def _pieces(flat: Tensor, layout: ContiguousLayout | ShardedLayout) -> list[Tensor]:
    """Cut this rank's slice of a group's gradients, `flat.grad` [n], into the shares of its parameters, without what pads it."""
    assert flat.grad is not None and isinstance(layout, ContiguousLayout), "ZeRO 1 hands the optimizer a flat gradient for every group"
    low, size = dist.get_rank(layout.process_group) * flat.numel(), flat.numel()
    spans = [(o - low, o - low + s.numel()) for o, s in zip(layout.offsets, layout.shapes, strict=True)]
    return [flat.grad[max(start, 0) : min(end, size)] for start, end in spans if start < size and end > 0]


def _squares(pieces: list[Tensor], like: Tensor) -> Tensor:
    """Sum the squares of gradients: [] fp32."""
    if not pieces:
        return like.new_zeros(())
    return torch.stack(torch._foreach_norm(pieces, 2.0, dtype=NORM_DTYPE)).pow(2.0).sum().float()
