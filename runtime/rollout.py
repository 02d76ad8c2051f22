"""The loops' handle on the generators, which live in the ranks and read the weights that the trainer updates."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import pairwise

from domains.types import Prompt, Sample
from runtime.config import SamplingConfig
from runtime.trainer import Group


class Rollout:
    """Answers prompts with the policy of the moment."""

    def __init__(self, group: Group) -> None:
        self._group = group

    def generate(
        self, prompts: Sequence[Prompt], sampling: SamplingConfig, *, samples: int = 1, stream: str = "", version: int = 0
    ) -> list[Sample]:
        """Answer prompts of one domain.

        Args:
            prompts: P prompts of one domain.
            sampling: temperature and budgets.
            samples: G answers a prompt.
            stream: names the random stream; with it, prompt and weights the samples are determined.
            version: optimizer steps that the weights have seen.

        Returns:
            P * G samples, those of one prompt together.
        """
        ranks = self._group.ranks
        seeds = [seed_of(stream, prompt.id) for prompt in prompts]
        bounds = [len(prompts) * rank // ranks for rank in range(ranks + 1)]
        shares = [(list(prompts[a:b]), seeds[a:b], sampling) for a, b in pairwise(bounds)]
        out = [sample for part in self._group.call("generate", shares, samples=samples) for sample in part]
        for sample in out:
            sample.policy_version = version
        return out


def seed_of(*names: object) -> int:
    """Derive a 63-bit seed from names, the same on every machine."""
    return int.from_bytes(hashlib.blake2b("/".join(map(str, names)).encode(), digest_size=8).digest()) >> 1
