"""Group-relative advantages. Knows no torch."""

from __future__ import annotations

from collections.abc import Sequence

from domains.types import Verdict


def group_advantages(verdicts: Sequence[Verdict], *, samples_per_prompt: int) -> list[float | None]:
    """Return reward - mean reward of the prompt's graded samples, for each sample.

    A sample whose verification failed for reasons of its own gets None: it is masked, and counts in no mean.

    Args:
        verdicts: P * G, those of one prompt together.
        samples_per_prompt: G.

    Returns:
        P * G advantages.

    Source: DeepSeek-V3.2 paper, section 3.1 (no division by the standard deviation).
    """
    advantages: list[float | None] = []
    for start in range(0, len(verdicts), samples_per_prompt):
        rewards = [None if v.status == "infrastructure" else v.reward for v in verdicts[start : start + samples_per_prompt]]
        graded = [r for r in rewards if r is not None]
        mean = sum(graded) / max(1, len(graded))
        advantages += [None if r is None else r - mean for r in rewards]
    return advantages
