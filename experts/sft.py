"""Supervised cold start: of one specialist on its domain's demonstrations, or of the student on all domains'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from domains.catalog import make_domain
from domains.types import Domain
from experts.job import SftJob
from experts.supervised import train
from model.tokenizer import Tokenizer
from runtime.batch import PackedSample
from runtime.evaluate import hand_on
from runtime.generation.conversation import demonstration_tokens
from runtime.ranks import running_ranks
from runtime.spec import EngineSpec
from runtime.step import StepContext


def run(context: StepContext, job: SftJob) -> dict[str, Any]:
    """Train on demonstrations, evaluate on the same domains' held-out prompts, hand the model on."""
    start = context.inputs[job.start]
    domains = {name: make_domain(name, setup.domain, context.sandbox) for name, setup in job.domains.items()}
    samples = demonstration_samples(start, list(domains.values()), count=job.supervised.demonstrations, seed=context.seed)
    config = job.supervised
    spec = EngineSpec(
        model=str(start),
        optimizer=config.optimizer,
        domains=job.domains,
        train_mtp=config.mtp_loss_weight > 0,
        train_indexer=config.indexer_loss_weight > 0,
    )
    with running_ranks(context, spec) as (trainer, rollout):
        tokens = train(context, trainer, samples, job.supervised)
        made = hand_on(context, (trainer, rollout), domains, job.domains, prompts=job.evaluation.prompts)
    return made | {"tokens": tokens, "steps": job.supervised.steps}


def demonstration_samples(model: Path, domains: list[Domain], *, count: int, seed: int) -> list[PackedSample]:
    """Encode `count` demonstrations of each domain with a model's tokenizer; the loss reads what the assistant wrote."""
    tokenizer = Tokenizer.load(model)
    samples = []
    for domain in domains:
        for demonstration in domain.demonstrations(count, seed=seed):
            tokens, written = demonstration_tokens(tokenizer, demonstration.prompt.messages, demonstration.messages, domain.thinking_mode)
            samples.append(PackedSample(tokens, written))
    return samples
