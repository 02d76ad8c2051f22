"""Write a step's metrics and progress to its work directory, which is the truth, and to W&B, which is a view of it."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
PROGRESS = "progress.json"


class Tracker:
    """One step's metrics: appended to `metrics.jsonl`, one JSON object a line with the key `step`, flushed line by line."""

    def __init__(self, workdir: Path) -> None:
        """Track into a work directory, which must exist."""
        self.workdir = workdir
        self._latest: dict[str, float] = {}
        self._phase: tuple[str, int, float] | None = None

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line.

        Args:
            step: optimizer step, counted from 0.
            metrics: flat, under the field's names (`reward/mean`, `perf/tokens_per_s`); numbers only, not-a-number is kept as null.
        """
        values = {name: float(value) for name, value in metrics.items()}
        line = {"step": step} | {name: value if math.isfinite(value) else None for name, value in values.items()}
        with (self.workdir / METRICS).open("a") as file:
            file.write(json.dumps(line) + "\n")
        self._latest |= values
        logger.info("step %d | %s", step, " | ".join(f"{name} {value:.4g}" for name, value in values.items()))

    def progress(self, done: int, total: int, note: str = "") -> None:
        """Say how far the current phase is; a new `note` (`rollout`, `evaluating`) starts a new phase and its own bar."""
        now = time.time()
        if self._phase is None or self._phase[0] != note or done < self._phase[1]:
            self._phase = (note, done, now)
        finite = {name: value for name, value in self._latest.items() if math.isfinite(value)}
        state = {
            "done": done,
            "total": total,
            "note": note,
            "since_done": self._phase[1],
            "since": self._phase[2],
            "now": now,
            "metrics": finite,
        }
        temporary = self.workdir / (PROGRESS + ".tmp")
        temporary.write_text(json.dumps(state))
        os.replace(temporary, self.workdir / PROGRESS)

    def resume_from(self, step: int) -> None:
        """Forget what a killed attempt logged past its last checkpoint.

        Args:
            step: the first step that will be run now; lines of it and of later steps, and a torn last line, are dropped.
        """
        path = self.workdir / METRICS
        if not path.exists():
            return
        kept = [line for line in read_metrics(path) if line["step"] < step]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(temporary, path)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Close the sinks; `summary` is what the step returned."""


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read a `metrics.jsonl`; a torn last line, left by a kill, is dropped.

    Raises:
        ValueError: another line is not a JSON object with `step`; names file and line.
    """
    lines = path.read_text().split("\n")
    complete = lines[:-1]
    found = []
    for number, line in enumerate(complete, start=1):
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: got {line[:80]!r}, expected a JSON object") from error
        if not isinstance(value, dict) or "step" not in value:
            raise ValueError(f"{path}:{number}: got {line[:80]!r}, expected a JSON object with `step`")
        found.append(value)
    return found
