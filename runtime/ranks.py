"""Bring a step's ranks up and down again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from runtime.cluster import RayGroup
from runtime.rollout import Rollout
from runtime.spec import EngineSpec
from runtime.step import StepContext
from runtime.trainer import Trainer


@contextmanager
def running_ranks(context: StepContext, spec: EngineSpec) -> Iterator[tuple[Trainer, Rollout]]:
    """Start the ranks that a step asks for and hand out both handles on them.

    Args:
        context: whose cluster, engine and sandbox settings count.
        spec: the rest: model, optimizer, domains, frozen models.
    """
    spec = replace(
        spec,
        deepspeed=context.engine.deepspeed,
        quantization=context.engine.quantization,
        kernels=context.engine.kernels,
        threads=context.cluster.threads_per_rank,
        sandbox=context.sandbox,
        ranks=context.cluster.ranks,
    )
    group = RayGroup(spec, name=context.name, config=context.cluster)
    trainer = Trainer(group, workdir=context.workdir)
    try:
        yield trainer, Rollout(group)
    finally:
        trainer.settle()
    group.close()
