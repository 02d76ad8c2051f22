"""Write a step's metrics and progress to its work directory, which is the truth, and to W&B, which is a view of it."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runtime.config import TrackingConfig

logger = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
PROGRESS = "progress.json"


class Tracker:
    """One step's metrics: appended to `metrics.jsonl`, one JSON object a line with the key `step`, flushed line by line."""

    def __init__(self, workdir: Path, sink: WandbSink | None = None) -> None:
        """Track into a work directory, which must exist, and into `sink` where there is one."""
        self.workdir = workdir
        self._sink = sink
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
        if self._sink is not None:
            self._sink.log(line)
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
        if self._sink is not None:  # An offline W&B run cannot be continued, so the new one gets the old lines.
            for line in kept:
                self._sink.log(line)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Close the sinks; `summary` is what the step returned."""
        if self._sink is not None:
            self._sink.finish(summary)


class WandbSink:
    """One W&B run, of one step or of the closing report."""

    def __init__(self, run: Any) -> None:
        """Wrap what `wandb.init` returned."""
        self._run = run
        run.define_metric("step")
        run.define_metric("*", step_metric="step")

    def log(self, line: Mapping[str, float | None]) -> None:
        """Send one line of metrics, `step` among them; a null is left out."""
        self._run.log({name: value for name, value in line.items() if value is not None})

    def table(self, name: str, columns: list[str], rows: list[list[Any]]) -> None:
        """Send a table."""
        # Imported here: loaded only when W&B is on.
        import wandb

        self._run.log({name: wandb.Table(columns=[*columns], data=rows)})

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Store the numbers of a nested summary, flat, and close the run."""
        self._run.summary.update(_flat("", summary))
        self._run.finish()


def open_wandb(tracking: TrackingConfig, *, run_dir: Path, group: str, step: str, values: Mapping[str, Any]) -> WandbSink | None:
    """Start a W&B run in a group, or return None when tracking is off; W&B is imported only when it is on.

    Args:
        tracking: mode and project.
        run_dir: where W&B writes; it makes its own folder `wandb` there.
        group: the run's name; all its steps share it.
        step: name of the W&B run; its part before `-` is the job type.
        values: the run's configuration; values of keys that look like secrets are blanked.
    """
    if tracking.wandb == "off":
        return None
    # Imported here: half a second, and mode `off` must work without it.
    import wandb

    run = wandb.init(
        project=tracking.project,
        group=group,
        name=f"{group}/{step}",
        job_type=step.split("-")[0],
        dir=str(run_dir),
        mode="offline" if tracking.wandb == "offline" else "online",
        config=redact(values),
        reinit="create_new",
        settings=wandb.Settings(silent=True, console="off", disable_git=True, save_code=False),
    )
    return WandbSink(run)


def redact(values: Any) -> Any:
    """Blank the texts under keys that look like secrets, at any depth; numbers (`row_tokens`) stay."""
    if isinstance(values, Mapping):
        return {name: "***" if isinstance(value, str) and _SECRET.search(str(name)) else redact(value) for name, value in values.items()}
    return [redact(value) for value in values] if isinstance(values, list | tuple) else values


_SECRET = re.compile(r"(^|_)(key|apikey|token|secret|password|credential)s?$", re.IGNORECASE)


def _flat(prefix: str, node: Mapping[str, Any]) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, value in node.items():
        if isinstance(value, Mapping):
            found |= _flat(f"{prefix}{name}/", value)
        elif isinstance(value, int | float):
            found[prefix + name] = value
    return found


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
