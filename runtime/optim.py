"""Muon for matrices, AdamW for the rest, as one torch optimizer that steps under every ZeRO stage.

DeepSpeed's ZeRO hands an optimizer flat slices of parameters. Muon needs whole matrices, so a flat slice comes with a
`FlatLayout` that knows how to gather its neighbours, cut the matrices out, and put this rank's share of the update back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from model.kernels.newton_schulz.op import orthogonalize
from runtime.config import OptimizerConfig


def is_matrix(name: str, parameter: Tensor) -> bool:
    """Say whether Muon trains a parameter: every matrix but the embedding, the head and the mHC gating factors.

    Source: DeepSeek-V4 report, section 2.4; `attn_sink`, norms and biases are vectors.
    """
    return parameter.ndim >= 2 and not name.endswith(("embed.weight", "head.weight"))


class FlatLayout(Protocol):
    """How one flat slice of a parameter group relates to whole matrices."""

    def update(self, flat: Tensor, transform: Callable[[list[Tensor]], list[Tensor]]) -> Tensor:
        """Apply `transform` to the whole matrices of which `flat` [n] is this rank's share; returns this rank's share [n]."""


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
        """Update every parameter that has a gradient."""
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
        momentum = self.config.momentum
        directions = []
        for parameter in parameters:
            state, gradient = self.state[parameter], parameter.grad
            assert gradient is not None
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            buffer = state["momentum_buffer"].mul_(momentum).add_(gradient)
            directions.append(torch.add(gradient, buffer, alpha=momentum))
        whole = [i for i, p in enumerate(parameters) if p not in self.layouts]
        for i, update in zip(whole, self._scaled_updates([directions[i] for i in whole]), strict=True):
            directions[i] = update
        for i, parameter in enumerate(parameters):
            if parameter in self.layouts:
                directions[i] = self.layouts[parameter].update(directions[i], self._scaled_updates)
            parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(directions[i], alpha=-group["lr"])

    def _scaled_updates(self, matrices: list[Tensor]) -> list[Tensor]:
        """Orthogonalise a list of [N, M] or [E, N, M], those of one shape together, and scale them to the update RMS."""
        shapes: dict[tuple[int, int], list[int]] = {}
        for i, matrix in enumerate(matrices):
            shapes.setdefault((min(matrix.shape[-2:]), max(matrix.shape[-2:])), []).append(i)
        out: list[Tensor] = list(matrices)
        for (low, high), members in shapes.items():
            wide = [matrices[i].mT if matrices[i].shape[-2] > matrices[i].shape[-1] else matrices[i] for i in members]
            counts = [math.prod(w.shape[:-2]) for w in wide]
            stacked = orthogonalize(torch.cat([w.reshape(-1, low, high) for w in wide])) * (self.config.update_rms * math.sqrt(high))
            for i, piece in zip(members, stacked.split(counts), strict=True):
                tall = matrices[i].shape[-2] > matrices[i].shape[-1]
                out[i] = (piece.mT if tall else piece).reshape(matrices[i].shape)
        return out

    def _adamw(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        beta1, beta2 = self.config.betas
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
                state["steps"] = torch.zeros((), dtype=torch.float32)
            state["steps"] += 1
            state["exp_avg"].lerp_(parameter.grad, 1 - beta1)
            state["exp_avg_sq"].mul_(beta2).addcmul_(parameter.grad, parameter.grad, value=1 - beta2)
            steps = state["steps"].item()
            scale = math.sqrt(1 - beta2**steps) / (1 - beta1**steps)
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.addcdiv_(state["exp_avg"], state["exp_avg_sq"].sqrt().add_(self.config.eps), value=-group["lr"] * scale)
