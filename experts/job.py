"""What the workflow hands to the supervised steps; everything here can change their result."""

from __future__ import annotations

from dataclasses import dataclass

from experts.config import SupervisedConfig
from model.config import AnyConfig
from runtime.config import EvaluationConfig
from runtime.step import DomainSetup


@dataclass(kw_only=True)
class PretrainJob:
    """Make the base: train the tokenizer and a fresh model on all domains' documents.

    Attributes:
        model: the architecture; `vocab_size` is also what the tokenizer is trained to.
        domains: whose documents, by name, in the order of the configuration.
        supervised: how it trains.
        evaluation: how the base is evaluated, on every domain.
    """

    model: AnyConfig
    domains: dict[str, DomainSetup]
    supervised: SupervisedConfig
    evaluation: EvaluationConfig


@dataclass(kw_only=True)
class AdoptJob:
    """Take a checkpoint as the base, whatever layout it is in.

    Attributes:
        path: directory with `config.json`, weights and tokenizer.
        domains: what it is evaluated on.
        evaluation: how.
    """

    path: str
    domains: dict[str, DomainSetup]
    evaluation: EvaluationConfig


@dataclass(kw_only=True)
class SftJob:
    """Train on demonstrations: of one domain for a specialist, of all for the student's warm-up.

    Attributes:
        domains: whose demonstrations, by name.
        supervised: how it trains.
        evaluation: how the result is evaluated, on the same domains.
        start: name of the step whose model it starts from.
    """

    domains: dict[str, DomainSetup]
    supervised: SupervisedConfig
    evaluation: EvaluationConfig
    start: str = "base"
