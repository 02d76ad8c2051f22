"""pass@1 on held-out prompts, greedily, with a confidence interval."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from domains.types import Domain, Verdict
from runtime.config import SamplingConfig
from runtime.rollout import Rollout
from runtime.step import DomainSetup, StepContext
from runtime.trainer import Trainer


def evaluate(rollout: Rollout, domain: Domain, *, prompts: int, sampling: SamplingConfig, seed: int) -> dict[str, Any]:
    """Answer held-out prompts greedily and grade them.

    Returns:
        `pass@1` (mean reward over graded prompts), `n` graded prompts, `ci95` [lo, hi] (Wilson), `passed` 0 or 1 a prompt (None where the
        verification failed for reasons of its own), `infrastructure` count of those, `tokens` sampled, `statuses` counted, and the
        seconds `generate_s` and `grade_s`.
    """
    held_out = domain.prompts("heldout", prompts, seed=seed)
    began = time.monotonic()
    samples = rollout.generate(held_out, replace(sampling, temperature=0.0))
    generated = time.monotonic()
    verdicts = domain.grade(samples)
    graded_s = time.monotonic() - generated
    passed = [None if v.status == "infrastructure" else int(v.reward >= 1.0) for v in verdicts]
    graded = [p for p in passed if p is not None]
    return {
        "pass@1": sum(graded) / max(1, len(graded)),
        "n": len(graded),
        "ci95": list(wilson(sum(graded), len(graded))),
        "passed": passed,
        "infrastructure": len(passed) - len(graded),
        "tokens": sum(sum(s.sampled) for s in samples),
        "statuses": count_statuses(verdicts),
        "generate_s": generated - began,
        "grade_s": graded_s,
    }


def evaluate_all(
    context: StepContext, rollout: Rollout, domains: Mapping[str, Domain], setups: Mapping[str, DomainSetup], *, prompts: int
) -> dict[str, Any]:
    """Evaluate on several domains, reporting progress; returns domain name to what `evaluate` returns."""
    found = {}
    for done, (name, domain) in enumerate(domains.items()):
        context.tracker.progress(done, len(domains), "evaluating")
        found[name] = evaluate(rollout, domain, prompts=prompts, sampling=setups[name].sampling, seed=context.seed)
    return found


def hand_on(
    context: StepContext, ranks: tuple[Trainer, Rollout], domains: Mapping[str, Domain], setups: Mapping[str, DomainSetup], *, prompts: int
) -> dict[str, Any]:
    """End a step: evaluate its model on the domains' held-out prompts, write it as the step's artifact, close the domains.

    Returns:
        `evaluation` by domain, and `peak_memory_gib` of a rank.
    """
    trainer, rollout = ranks
    evaluation = evaluate_all(context, rollout, domains, setups, prompts=prompts)
    trainer.export(context.artifact)
    for domain in domains.values():
        domain.close()
    return {"evaluation": evaluation, "peak_memory_gib": trainer.peak_memory_gib()}


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """Return the 95 % Wilson interval of a proportion; (0, 1) without trials."""
    if trials == 0:
        return 0.0, 1.0
    z = 1.959964
    p, shrink = successes / trials, 1 + z * z / trials
    centre = (p + z * z / (2 * trials)) / shrink
    half = z * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials)) / shrink
    return max(0.0, centre - half), min(1.0, centre + half)


def count_statuses(verdicts: Sequence[Verdict]) -> dict[str, int]:
    """Count verdicts by status."""
    found: dict[str, int] = {}
    for verdict in verdicts:
        found[verdict.status] = found.get(verdict.status, 0) + 1
    return found
