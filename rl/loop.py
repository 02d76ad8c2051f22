"""GRPO of one domain: sample groups, grade them, follow the advantage.

prompts_P -> samples_PG (tokens, the rollout's log-probs) -> verdicts_PG -> advantages_PG -> packed rows -> gradient -> weights
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from domains.catalog import make_domain
from domains.types import Domain, Sample, Verdict
from rl.advantages import group_advantages
from rl.config import GrpoConfig
from rl.job import GrpoJob
from runtime.batch import Batch, PackedSample, pack
from runtime.evaluate import count_statuses, hand_on
from runtime.ranks import running_ranks
from runtime.rollout import Rollout
from runtime.schedule import learning_rate
from runtime.spec import EngineSpec, LossSpec
from runtime.step import StepContext
from runtime.trainer import Trainer

REFERENCE = "reference"


def run(context: StepContext, job: GrpoJob) -> dict[str, Any]:
    """Cultivate one specialist from its SFT checkpoint, evaluate it on all domains' held-out prompts, hand it on."""
    start, setup = context.inputs[job.start], job.domain
    setups = {setup.name: setup} | job.others
    domains = {name: make_domain(name, s.domain, context.sandbox) for name, s in setups.items()}
    frozen = {REFERENCE: str(start)} if job.grpo.kl_weight > 0 else {}
    spec = EngineSpec(model=str(start), optimizer=job.grpo.optimizer, domains=setups, frozen=frozen)
    with running_ranks(context, spec) as (trainer, rollout):
        tokens = train(context, trainer, rollout, domains[setup.name], job)
        made = hand_on(context, (trainer, rollout), domains, setups, prompts=job.evaluation.prompts)
    return made | {"tokens": tokens, "steps": job.grpo.steps}


def train(context: StepContext, trainer: Trainer, rollout: Rollout, domain: Domain, job: GrpoJob) -> int:
    """Run GRPO from the last checkpoint on; returns the tokens sampled, over all attempts."""
    config, sampling, tracker = job.grpo, job.domain.sampling, context.tracker
    prompts = domain.prompts("train", config.train_prompts, seed=context.seed)
    state = trainer.resume()
    tracker.resume_from(state["step"])
    tokens = state.get("tokens", 0)
    for step in range(state["step"], config.steps):
        began = time.monotonic()
        first = step * config.prompts_per_step
        prompts_P = [prompts[i % len(prompts)] for i in range(first, first + config.prompts_per_step)]
        stream = f"{context.seed}/{context.name}/{step}"
        samples_PG = rollout.generate(prompts_P, sampling, samples=config.samples_per_prompt, stream=stream, version=step)
        sampled = time.monotonic()
        verdicts_PG = domain.grade(samples_PG)
        refuse_broken_verifier(verdicts_PG, config)
        advantages_PG = group_advantages(verdicts_PG, samples_per_prompt=config.samples_per_prompt)
        graded = time.monotonic()
        metrics = update(trainer, samples_PG, advantages_PG, context=context, job=job, step=step)
        refuse_mismatch(metrics, config)
        tokens += sum(sum(s.sampled) for s in samples_PG)
        seconds = {"time/generate_s": sampled - began, "time/grade_s": graded - sampled, "time/train_s": time.monotonic() - graded}
        tracker.log(step, metrics | describe(samples_PG, verdicts_PG, elapsed_s=time.monotonic() - began) | seconds)
        tracker.progress(step + 1, config.steps, "rollout")
        if (step + 1) % config.save_every == 0 or step + 1 == config.steps:
            trainer.save(step + 1, {"tokens": tokens})
    return tokens


def update(
    trainer: Trainer, samples: Sequence[Sample], advantages: Sequence[float | None], *, context: StepContext, job: GrpoJob, step: int
) -> dict[str, float]:
    """Take the optimizer steps of one rollout; samples that teach nothing (masked, or of advantage 0 without a KL) are left out."""
    config = job.grpo
    spec = LossSpec(
        "rl.loss:grpo",
        {
            "clip": (config.clip_low, config.clip_high),
            "kl_weight": config.kl_weight,
            "mask_nats": config.off_policy_mask_nats,
            "temperature": job.domain.sampling.temperature,
        },
    )
    useful = [
        PackedSample(
            s.tokens, s.sampled, {"logprobs": s.logprobs, "advantages": np.full(len(s.tokens), a, np.float32)}, shared=s.sampled.index(True)
        )
        for s, a in zip(samples, advantages, strict=True)
        if a is not None and (a != 0 or config.kl_weight > 0) and any(s.sampled)
    ]
    metrics: dict[str, float] = {"reward/informative_fraction": len(useful) / len(samples)}
    lr = learning_rate(step, config=config.optimizer, steps=config.steps)
    for part in range(config.updates_per_rollout):
        if not (mine := useful[part :: config.updates_per_rollout]):
            continue
        rows = pack(mine, row_tokens=context.engine.row_tokens, ranks=trainer.ranks)
        if config.kl_weight > 0:
            add_reference(trainer, rows)
        measured = trainer.train_step(rows, spec, lr=lr)
        # Only before the first update do trainer and rollout hold the same weights; later ratios are meant to differ from 1.
        metrics = measured | metrics if part else metrics | measured
    return metrics


def add_reference(trainer: Trainer, rows: Sequence[Batch]) -> None:
    """Attach the reference model's log-probs to each row as field `reference_logprobs` [T]."""
    for row, values in zip(rows, trainer.logprobs(rows, REFERENCE), strict=True):
        full = np.zeros(len(row.tokens), np.float32)
        full[row.targets] = values
        row.fields["reference_logprobs"] = full


def refuse_broken_verifier(verdicts: Sequence[Verdict], config: GrpoConfig) -> None:
    """Stop when too many verdicts say nothing about the model.

    Raises:
        RuntimeError: names the share, the limit and one of the failures.
    """
    failed = [v for v in verdicts if v.status == "infrastructure"]
    if len(failed) > config.infrastructure_limit * len(verdicts):
        raise RuntimeError(
            f"{len(failed)} of {len(verdicts)} verifications failed for reasons of their own, more than the share "
            f"grpo.infrastructure_limit={config.infrastructure_limit:g} allows; the first: {failed[0].detail}"
        )


def refuse_mismatch(metrics: dict[str, float], config: GrpoConfig) -> None:
    """Stop when rollout and trainer no longer compute the same model.

    Raises:
        RuntimeError: names the measured divergence and the limit.
    """
    found = metrics.get("mismatch_kl/mean", 0.0)
    if not found <= config.mismatch_limit_nats:  # also catches not-a-number
        raise RuntimeError(
            f"the rollout's and the trainer's log-probs on the same tokens part by {found:.3g} nats (k3), more than "
            f"grpo.mismatch_limit_nats={config.mismatch_limit_nats:g}: the policy gradient would follow a model that nobody sampled from. "
            "Usual causes: decoding and training use different kernels or precisions, or weights were not shared; compare them with "
            "tests/runtime/test_agreement.py, or raise the limit if the difference is wanted"
        )


def describe(samples: Sequence[Sample], verdicts: Sequence[Verdict], *, elapsed_s: float) -> dict[str, float]:
    """Summarise a rollout under the field's metric names."""
    graded = [v.reward for v in verdicts if v.status != "infrastructure"]
    lengths = [sum(s.sampled) for s in samples]
    drafted = sum(s.drafted for s in samples)
    drafts = {"rollout/draft_acceptance": sum(s.accepted for s in samples) / drafted} if drafted else {}
    statuses = {f"status/{name}": count / len(verdicts) for name, count in sorted(count_statuses(verdicts).items())}
    return (
        {
            "reward/mean": sum(graded) / max(1, len(graded)),
            "response_length/mean": sum(lengths) / len(lengths),
            "response_length/truncated_fraction": sum(s.truncated for s in samples) / len(samples),
            "errored/infrastructure": sum(v.status == "infrastructure" for v in verdicts),
            "perf/tokens_per_s": sum(lengths) / elapsed_s,
        }
        | statuses
        | drafts
    )
