"""Where the time of a step went: generating, grading, training, and the rest (starting up, saving, waiting)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from runtime.tracking import METRICS, read_metrics

ACTIVITIES = ("generate", "grade", "train")


def time_shares(artifact: Path, manifest: Mapping[str, Any]) -> dict[str, float]:
    """Sum what a step's metrics and evaluation say of their seconds.

    Args:
        artifact: directory of what the step made, with its metrics.
        manifest: its `elapsed_s` and `summary`.

    Returns:
        seconds by activity, `rest` being what is left of `elapsed_s`; empty where the step recorded none.
    """
    lines = read_metrics(artifact / METRICS) if (artifact / METRICS).is_file() else []
    noted = [*lines, *({f"time/{name}": value for name, value in level.items()} for level in _evaluations(manifest))]
    seconds = {name: sum(entry.get(f"time/{name}_s") or 0.0 for entry in noted) for name in ACTIVITIES}
    if not any(seconds.values()):
        return {}
    return {name: round(value, 3) for name, value in seconds.items()} | {
        "rest": round(max(0.0, manifest["elapsed_s"] - sum(seconds.values())), 3)
    }


def describe_shares(steps: Iterable[Mapping[str, Any]]) -> str:
    """Say in one line how the time of several steps was shared out; "" where none recorded it."""
    found = [step["time_s"] for step in steps if "time_s" in step]
    total = sum(sum(each.values()) for each in found)
    if not total:
        return ""
    parts = {name: sum(each[name] for each in found) / total for name in (*ACTIVITIES, "rest")}
    verbs = {"generate": "generating", "grade": "grading", "train": "training", "rest": "starting, saving and waiting"}
    return "time of the steps: " + ", ".join(f"{verbs[name]} {share:.0%}" for name, share in parts.items())


def _evaluations(manifest: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return list(manifest["summary"].get("evaluation", {}).values())
