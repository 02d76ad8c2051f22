"""What travels to the ranks: how they come up, and which loss they compute. Knows no torch, so that loops stay light."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from domains.config import SandboxConfig
from runtime.config import OptimizerConfig, QuantizationConfig
from runtime.step import DomainSetup


@dataclass(kw_only=True)
class EngineSpec:
    """What a rank needs to know to come up.

    Attributes:
        model: directory with `config.json`, weights and tokenizer to start from.
        optimizer: how it trains.
        deepspeed: DeepSpeed's own keys.
        quantization: low precision that the models compute with.
        kernels: `auto`, `triton` or `reference`.
        threads: intra-op threads of this rank.
        frozen: name to directory of the models that losses compare with.
        domains: whose prompts this rank may be asked to answer.
        sandbox: limits of the domains' environments.
        ranks: number of ranks.
        train_mtp: whether a loss reaches the MTP block.
        train_indexer: whether a loss reaches the indexers.
        rendezvous: `tcp://host:port` or `file://path` where the ranks meet.
    """

    model: str
    optimizer: OptimizerConfig
    deepspeed: dict[str, Any] = field(default_factory=dict)
    quantization: QuantizationConfig = field(default_factory=QuantizationConfig)
    kernels: str = "auto"
    threads: int = 1
    frozen: dict[str, str] = field(default_factory=dict)
    domains: dict[str, DomainSetup] = field(default_factory=dict)
    sandbox: SandboxConfig = field(default_factory=SandboxConfig)
    ranks: int = 1
    train_mtp: bool = False
    train_indexer: bool = False
    rendezvous: str = ""


@dataclass(frozen=True)
class LossSpec:
    """A loss by name, so that the process that loops need not import torch.

    Attributes:
        target: `module:function`; the function takes (`runtime.objective.Rows`, head weight [V, D], **options) and returns
            (sum [] fp32, metrics: name to summed [] tensor).
        options: keyword arguments of the function.
        balance_weight: weight of the routers' balance loss.
        mtp_weight: weight of the MTP block's cross-entropy.
        indexer_weight: weight of the indexers' loss.
        indexer: "dense" or "sparse" attention while the indexers learn, "" where they do not, see `model.layout.PackedRow`.
    """

    target: str
    options: dict[str, Any] = field(default_factory=dict)
    balance_weight: float = 0.0
    mtp_weight: float = 0.0
    indexer_weight: float = 0.0
    indexer: str = ""

    def resolve(self) -> Callable[..., Any]:
        """Import the function."""
        module, name = self.target.split(":")
        return getattr(importlib.import_module(module), name)
