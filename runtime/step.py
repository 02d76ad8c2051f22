"""What the workflow hands to every step of the recipe, and what a step may rely on."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from domains.config import DomainConfig, SandboxConfig
from runtime.config import ClusterConfig, EngineConfig, SamplingConfig
from runtime.tracking import Tracker


@dataclass(kw_only=True)
class DomainSetup:
    """One domain as a step sees it.

    Attributes:
        name: the user's name for it, unique in a run; several names may share one `domain.kind`.
        domain: where its tasks come from.
        sampling: how its prompts are sampled while training; evaluation takes the same budget, greedily.
    """

    name: str
    domain: DomainConfig
    sampling: SamplingConfig


@dataclass(kw_only=True)
class StepContext:
    """Where a step works, what it may read, and what it reports to.

    A step function is `run(context, job) -> dict[str, Any]`: it trains, writes what it hands on under `artifact`, and returns a
    JSON-able summary (`evaluation`: per domain `pass@1`, `n`, `ci95`, `passed`; `tokens`; `steps`) that the workflow stores in the
    manifest of the committed artifact. A step that is killed is called again with the same `workdir` and goes on from its checkpoints.

    Attributes:
        name: name of the step, `sft-math`.
        workdir: lives until the step is done (checkpoints, metrics.jsonl, progress.json); survives a kill, reused by the next attempt.
        artifact: `workdir / "artifact"`, what the step hands on; exists, and is committed by the workflow after `run` returned.
        inputs: committed artifact directories of the steps it needs, by step name; read only.
        tracker: where metrics and progress go.
        cluster: what Ray may reserve for the ranks of this step.
        engine: how the ranks train.
        sandbox: limits for model-written code.
        seed: of the whole run; a step derives its own streams from it and `name`.
    """

    name: str
    workdir: Path
    artifact: Path
    inputs: dict[str, Path]
    tracker: Tracker
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    sandbox: SandboxConfig = field(default_factory=SandboxConfig)
    seed: int = 0
