"""What a router's scores and weights are made of."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rule:
    """How logits become scores, and scores weights.

    Attributes:
        scoring: "sqrtsoftplus" or "sigmoid".
        active: A, experts a token.
        normalises: whether a token's weights sum to `scaling`.
        scaling: factor of the weights.
    """

    scoring: str
    active: int
    normalises: bool
    scaling: float
