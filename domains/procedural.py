"""Seeded drawing of made-up tasks, with training and held-out sets that are disjoint by construction."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from random import Random
from typing import Protocol, TypeVar

SPLITS = ("train", "heldout")
_HELDOUT_SHARE = 4
"""One key in this many is held out. Ours: the training set stays the larger by far, the held-out set is never short."""
_PATIENCE = 2000
"""Draws in a row without a new task of the split, after which the space counts as used up."""


class Task(Protocol):
    """A made-up task."""

    @property
    def key(self) -> str:
        """What makes it this task and no other, without names and wording; decides its split."""


T = TypeVar("T", bound=Task)


def split_of(key: str) -> str:
    """Return the one split that a task's key belongs to, on every machine and for every seed."""
    digest = hashlib.sha256(key.encode()).digest()
    return "heldout" if int.from_bytes(digest[:8], "big") % _HELDOUT_SHARE == 0 else "train"


def draw_tasks(make: Callable[[Random], T], split: str, count: int, *, seed: int) -> list[T]:
    """Draw `count` different tasks of one split; a longer call extends a shorter one.

    Raises:
        ValueError: an unknown split, or the tasks at this difficulty run out.
    """
    if split not in SPLITS:
        raise ValueError(f"split: got {split!r}, expected one of {SPLITS}")
    random = Random(f"{split}/{seed}")
    tasks: list[T] = []
    seen: set[str] = set()
    misses = 0
    while len(tasks) < count:
        task = make(random)
        if task.key in seen or split_of(task.key) != split:
            misses += 1
            if misses > _PATIENCE:
                raise ValueError(f"{split}: got only {len(tasks)} different tasks at this difficulty, expected {count}")
            continue
        misses = 0
        seen.add(task.key)
        tasks.append(task)
    return tasks


def is_careful(random: Random, diligence: float, *, valuable: bool) -> bool:
    """Decide whether a demonstrator takes care over a task.

    People take more care where something valuable is at stake; with a third of the tasks valuable, the mean over all is `diligence`.
    """
    high = min(diligence + 0.6 * (1 - diligence), 3 * diligence)
    low = (3 * diligence - high) / 2
    return random.random() < (high if valuable else low)
