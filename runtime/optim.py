"""Muon for matrices, AdamW for the rest, as one torch optimizer that steps under every ZeRO stage.

DeepSpeed's ZeRO hands an optimizer flat slices of parameters. Muon needs whole matrices, so a flat slice comes with a
`FlatLayout` that knows how to gather its neighbours, cut the matrices out, and put this rank's share of the update back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from model.kernels.newton_schulz.op import orthogonalize_
from model.kernels.updates.op import adamw_, descend_, nesterov_
from model.kernels.updates.reference import AdamStep
from runtime.config import OptimizerConfig


def is_matrix(name: str, parameter: Tensor) -> bool:
    """Say whether Muon trains a parameter: every matrix but the embedding, the head and the mHC gating factors.

    Source: DeepSeek-V4 report, section 2.4; `attn_sink`, norms and biases are vectors.
    """
    return parameter.ndim >= 2 and not name.endswith(("embed.weight", "head.weight"))


class FlatLayout(Protocol):
    """How one flat slice of a parameter group relates to whole matrices."""

    def update(self, flat: Tensor, transform: Callable[[Sequence[Tensor]], None]) -> Tensor:
        """Let `transform` change the whole matrices of which `flat` [n] is this rank's share; returns this rank's share [n].

        `flat` itself may be overwritten.
        """


class HybridOptimizer(torch.optim.Optimizer):
    """Muon on the group marked `matrices`, AdamW on the other.

    Muon: M = mu M + G; O = NS(mu M + G); W = W (1 - lr wd) - lr gamma sqrt(max(n, m)) O, each expert's matrix on its own.

    Source: DeepSeek-V4 report, sections 2.4 and 4.2.2.
    """

    def __init__(self, named_parameters: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig) -> None:
        groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
        for name, parameter in named_parameters:
            if parameter.requires_grad:
                groups[config.name == "muon" and is_matrix(name, parameter)].append(parameter)
        super().__init__(
            [{"params": params, "matrices": matrices} for matrices, params in groups.items() if params],
            {"lr": config.lr, "weight_decay": config.weight_decay},
        )
        self.config = config
        self.layouts: Mapping[Tensor, FlatLayout] = {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient; the memory of a matrix's gradient then holds something else."""
        assert closure is None, "DeepSpeed computes the gradients"
        for group in self.param_groups:
            present = [p for p in group["params"] if p.grad is not None]
            if not present:
                continue
            if group["matrices"]:
                self._muon(present, group)
            else:
                self._adamw(present, group)

    def _muon(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        gradients = []
        for parameter in parameters:
            state, gradient = self.state[parameter], parameter.grad
            assert gradient is not None
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            nesterov_(gradient, state["momentum_buffer"], self.config.momentum)
            gradients.append(gradient)
        self._update([g for p, g in zip(parameters, gradients, strict=True) if p not in self.layouts])
        for parameter, direction in zip(parameters, gradients, strict=True):
            if parameter in self.layouts:
                direction = self.layouts[parameter].update(direction, self._update)
            descend_(parameter, direction, group["lr"], 1 - group["lr"] * group["weight_decay"])

    def _update(self, matrices: Sequence[Tensor]) -> None:
        """Turn directions [N, M] or [E, N, M] into updates of the configured RMS, in place."""
        if matrices:
            orthogonalize_(matrices, self.config.update_rms)

    def _adamw(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        beta1, beta2 = self.config.betas
        for parameter in parameters:
            state, gradient = self.state[parameter], parameter.grad
            assert gradient is not None
            if "exp_avg" not in state:
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
            # No tensor, as older checkpoints have: torch loads one to the parameter's GPU, and reading it there would wait.
            steps = state["steps"] = int(state.get("steps", 0)) + 1
            rate = group["lr"] * (math.sqrt(1 - beta2**steps) / (1 - beta1**steps))
            step = AdamStep((beta1, beta2), self.config.eps, rate, 1 - group["lr"] * group["weight_decay"])
            adamw_(parameter, gradient, (state["exp_avg"], state["exp_avg_sq"]), step)
