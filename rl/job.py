"""What the workflow hands to the GRPO step; everything here can change its result."""

from __future__ import annotations

from dataclasses import dataclass

from rl.config import GrpoConfig
from runtime.config import EvaluationConfig
from runtime.step import DomainSetup


@dataclass(kw_only=True)
class GrpoJob:
    """Cultivate one specialist by reinforcement.

    Attributes:
        domain: whose prompts and verifier.
        grpo: how it trains.
        evaluation: how the specialist is evaluated, on its domain.
        start: name of the step whose model it starts from, `sft-math`.
    """

    domain: DomainSetup
    grpo: GrpoConfig
    evaluation: EvaluationConfig
    start: str
