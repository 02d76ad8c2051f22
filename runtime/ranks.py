"""Bring a step's ranks up and down again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from runtime.cluster import RayGroup
from runtime.config import OptimizerConfig
from runtime.rollout import Rollout
from runtime.spec import EngineSpec
from runtime.step import DomainSetup, StepContext
from runtime.trainer import Trainer


@contextmanager
def running_ranks(
    context: StepContext,
    *,
    model: Path,
    optimizer: OptimizerConfig,
    domains: Mapping[str, DomainSetup],
    frozen: Mapping[str, Path] | None = None,
) -> Iterator[tuple[Trainer, Rollout]]:
    """Start the ranks that a step asks for and hand out both handles on them.

    Args:
        context: whose cluster, engine and sandbox settings count.
        model: directory to start from.
        optimizer: how it trains.
        domains: whose prompts the rollout may be given.
        frozen: name to directory of the models that losses compare with.
    """
    spec = engine_spec(context, model=model, optimizer=optimizer, domains=domains, frozen=frozen or {})
    group = RayGroup(spec, name=context.name, config=context.cluster)
    yield Trainer(group, optimizer=optimizer, workdir=context.workdir), Rollout(group)
    group.close()


def engine_spec(
    context: StepContext, *, model: Path, optimizer: OptimizerConfig, domains: Mapping[str, DomainSetup], frozen: Mapping[str, Path]
) -> EngineSpec:
    """Translate a step's settings for its ranks."""
    return EngineSpec(
        model=str(model),
        optimizer=optimizer,
        deepspeed=context.engine.deepspeed,
        threads=context.cluster.threads_per_rank,
        frozen={name: str(path) for name, path in frozen.items()},
        domains=dict(domains),
        sandbox=context.sandbox,
        ranks=context.cluster.ranks,
    )
