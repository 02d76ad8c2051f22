"""The base from a checkpoint: read in any layout, evaluated, handed on."""

from __future__ import annotations

from typing import Any

from domains.catalog import make_domain
from experts.job import AdoptJob
from runtime.config import OptimizerConfig
from runtime.evaluate import hand_on
from runtime.ranks import running_ranks
from runtime.spec import EngineSpec
from runtime.step import StepContext


def run(context: StepContext, job: AdoptJob) -> dict[str, Any]:
    """Evaluate a checkpoint on every domain's held-out prompts and write it as the base's artifact, tokenizer included."""
    domains = {name: make_domain(name, setup.domain, context.sandbox) for name, setup in job.domains.items()}
    spec = EngineSpec(model=job.path, optimizer=OptimizerConfig(), domains=job.domains)
    with running_ranks(context, spec) as (trainer, rollout):
        made = hand_on(context, (trainer, rollout), domains, job.domains, prompts=job.evaluation.prompts)
    return made | {"tokens": 0, "steps": 0}
