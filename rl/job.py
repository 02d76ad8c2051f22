"""What the workflow hands to the GRPO step; everything here can change its result."""

from __future__ import annotations

from dataclasses import dataclass, field

from rl.config import GrpoConfig
from runtime.config import EvaluationConfig
from runtime.step import DomainSetup


@dataclass(kw_only=True)
class GrpoJob:
    """Cultivate one specialist by reinforcement.

    Attributes:
        domain: whose prompts and verifier.
        grpo: how it trains.
        others: the other domains, on which the specialist is evaluated too, so that it can be compared with the student.
        evaluation: how the specialist is evaluated.
        start: name of the step whose model it starts from, `sft-math`.
    """

    domain: DomainSetup
    grpo: GrpoConfig
    evaluation: EvaluationConfig
    start: str
    others: dict[str, DomainSetup] = field(default_factory=dict)
