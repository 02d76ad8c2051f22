"""Multi-teacher on-policy distillation: the student writes, each domain's expert says at every token what it would have written.

prompts of all domains -> student's samples -> rows of one teacher each -> KL(student || teacher), full vocabulary -> weights
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from distill.config import DistillConfig
from distill.job import DistillJob
from distill.teachers import refuse_foreign_teachers
from domains.catalog import make_domain
from domains.types import Domain, Prompt
from runtime.batch import PackedSample, pack
from runtime.evaluate import hand_on
from runtime.ranks import running_ranks
from runtime.rollout import Rollout
from runtime.schedule import learning_rate
from runtime.spec import EngineSpec, LossSpec
from runtime.step import StepContext
from runtime.trainer import Trainer


def run(context: StepContext, job: DistillJob) -> dict[str, Any]:
    """Merge the teachers into one student, evaluate it on every domain's held-out prompts, hand it on."""
    start = context.inputs[job.start]
    teachers = {name: context.inputs[step] for name, step in job.teachers.items()}
    refuse_foreign_teachers(start, teachers)
    domains = {name: make_domain(name, setup.domain, context.sandbox) for name, setup in job.domains.items()}
    frozen = {name: str(path) for name, path in teachers.items()}
    spec = EngineSpec(model=str(start), optimizer=job.distill.optimizer, domains=job.domains, frozen=frozen)
    with running_ranks(context, spec) as (trainer, rollout):
        tokens = train(context, trainer, rollout, domains, job)
        made = hand_on(context, (trainer, rollout), domains, job.domains, prompts=job.evaluation.prompts)
    return made | {"tokens": tokens, "steps": job.distill.steps}


def train(context: StepContext, trainer: Trainer, rollout: Rollout, domains: Mapping[str, Domain], job: DistillJob) -> int:
    """Run the distillation from the last checkpoint on; returns the tokens sampled, over all attempts."""
    config, tracker = job.distill, context.tracker
    pools = {name: domain.prompts("train", config.train_prompts, seed=context.seed) for name, domain in domains.items()}
    spec = LossSpec("distill.loss:reverse_kl", {"chunk": config.chunk_tokens})
    state = trainer.resume()
    tracker.resume_from(state["step"])
    tokens = state.get("tokens", 0)
    for step in range(state["step"], config.steps):
        began = time.monotonic()
        samples = []
        for name, prompts_P in prompts_of_step(pools, config, step).items():
            stream = f"{context.seed}/{context.name}/{name}/{step}"
            sampling = job.domains[name].sampling
            samples += rollout.generate(prompts_P, sampling, samples=config.samples_per_prompt, stream=stream, version=step)
        sampled = time.monotonic()
        packed = [
            PackedSample(s.tokens, s.sampled, teacher=s.prompt.domain, shared=s.sampled.index(True)) for s in samples if any(s.sampled)
        ]
        rows = pack(packed, row_tokens=context.engine.row_tokens, ranks=trainer.ranks)
        metrics = trainer.train_step(rows, spec, lr=learning_rate(step, config=config.optimizer, steps=config.steps))
        written = sum(sum(s.sampled) for s in samples)
        tokens += written
        now = time.monotonic()
        metrics |= {
            "response_length/mean": written / len(samples),
            "response_length/truncated_fraction": float(np.mean([s.truncated for s in samples])),
            "perf/tokens_per_s": written / (now - began),
            "time/generate_s": sampled - began,
            "time/train_s": now - sampled,
        }
        tracker.log(step, metrics)
        tracker.progress(step + 1, config.steps, "distilling")
        if (step + 1) % config.save_every == 0 or step + 1 == config.steps:
            trainer.save(step + 1, {"tokens": tokens})
    return tokens


def prompts_of_step(pools: Mapping[str, list[Prompt]], config: DistillConfig, step: int) -> dict[str, list[Prompt]]:
    """Choose a step's prompts: each domain its weighted share of `prompts_per_step`, walking through its pool."""
    weights = {name: config.weights.get(name, 1.0) for name in pools}
    total = sum(weights.values())
    chosen = {}
    for name, pool in pools.items():
        share = max(1, round(config.prompts_per_step * weights[name] / total))
        chosen[name] = [pool[i % len(pool)] for i in range(step * share, (step + 1) * share)]
    return chosen
