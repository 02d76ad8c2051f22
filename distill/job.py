"""What the workflow hands to the distillation step; everything here can change its result."""

from __future__ import annotations

from dataclasses import dataclass

from distill.config import DistillConfig
from runtime.config import EvaluationConfig
from runtime.step import DomainSetup


@dataclass(kw_only=True)
class DistillJob:
    """Merge the specialists into one student.

    Attributes:
        domains: whose prompts, by name.
        distill: how it trains.
        evaluation: how the student is evaluated, on every domain.
        start: name of the step whose model the student starts from, `warmup` or `base`.
        teachers: domain name to the step that made its teacher, `{"math": "grpo-math"}`.
    """

    domains: dict[str, DomainSetup]
    distill: DistillConfig
    evaluation: EvaluationConfig
    start: str
    teachers: dict[str, str]
