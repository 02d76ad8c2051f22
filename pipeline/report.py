"""Say how much of each expert the student kept: `report.json`, `report.html` and the closing table."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from pipeline.artifacts import MANIFEST, Journal
from pipeline.config import RunConfig, run_name
from pipeline.errors import UsageError, choose
from pipeline.live import duration
from pipeline.shares import describe_shares, time_shares
from runtime.config import TrackingConfig
from runtime.tracking import open_wandb

RESAMPLES = 10_000
LEVELS = ("base", "sft", "expert", "student")


@dataclass(frozen=True)
class Run:
    """What a run's directory says of it.

    Attributes:
        path: the directory.
        config: its resolved configuration.
        attempts: its journal, cut where an attempt starts.
        manifests: of the artifacts it used, by step name.
    """

    path: Path
    config: dict[str, Any]
    attempts: list[list[dict[str, Any]]]
    manifests: dict[str, dict[str, Any]]


def read_run(path: Path) -> Run:
    """Read a run's directory.

    Raises:
        UsageError: there is no such run; names the nearest.
    """
    if not (path / "config.yaml").is_file():
        names = sorted(found.parent.name for found in path.parent.glob("*/config.yaml"))
        raise UsageError(choose("run", path.name, names) if names else f"run: {path} is no run, and there is none beside it")
    attempts: list[list[dict[str, Any]]] = []
    for event in Journal(path / "journal.jsonl").read():
        attempts += [[]] if event["event"] == "run_started" else []
        attempts[-1].append(event)
    order = [entry["step"] for entry in attempts[-1][0]["steps"]]
    manifests = {name: json.loads(file.read_text()) for name in order if (file := path / "artifacts" / name / MANIFEST).is_file()}
    return Run(path, yaml.safe_load((path / "config.yaml").read_text()), attempts, manifests)


def summarize(run: Run) -> dict[str, Any]:
    """Compute `report.json`.

    Returns:
        `run`, `stage`, `elapsed_s`, `peak_rss_gib`, `domains` (per domain and level `pass@1`, `n`, `ci95`; `recovery`, `recovery_ci95`,
        `grpo_gain`, `grpo_gain_ci95`), `mean_over_domains` (pass@1 of each step evaluated on all domains), `mean_recovery`, `steps`
        (`status`, `elapsed_s`, `tokens`, `artifact`, `time_s` by activity, `peak_memory_gib`). What the stage did not make is absent;
        a recovery without gain to recover is null.
    """
    counted = _counted(run.attempts)
    domains = {name: _domain(name, run) for name in run.config["domains"]}
    recoveries = [found["recovery"] for found in domains.values() if found.get("recovery") is not None]
    done = {event["step"] for attempt in counted for event in attempt if event["event"] == "step_done"}
    return {
        "run": run.path.name,
        "stage": run.config["stage"],
        "seed": run.config["seed"],
        "elapsed_s": round(sum(attempt[-1]["time"] - attempt[0]["time"] for attempt in counted), 1),
        "peak_rss_gib": max((event.get("peak_rss_gib", 0.0) for attempt in counted for event in attempt), default=0.0),
        "peak_pss_gib": max((event.get("peak_pss_gib", 0.0) for attempt in counted for event in attempt), default=0.0),
        "domains": domains,
        "mean_over_domains": _means(run),
        "mean_recovery": sum(recoveries) / len(recoveries) if recoveries else None,
        "steps": {name: _step(run, name, made=name in done) for name in run.manifests},
    }


def _means(run: Run) -> dict[str, float]:
    """Average pass@1 over all domains for the base, each expert and the student, where a step was evaluated on all of them."""
    found = {}
    for name, manifest in run.manifests.items():
        evaluation = manifest.get("summary", {}).get("evaluation", {})
        if evaluation.keys() == run.config["domains"].keys():
            found[name] = sum(level["pass@1"] for level in evaluation.values()) / len(evaluation)
    return found


def _counted(attempts: list[list[dict[str, Any]]]) -> list[list[dict[str, Any]]]:
    """Keep the attempts that made this run: the last that ran a step, and the unfinished ones of the same steps before it."""
    worked = [i for i, attempt in enumerate(attempts) if any(event["event"] == "step_started" for event in attempt)]
    if not worked:
        return attempts[-1:]
    last = worked[-1]
    first = last
    while first > 0 and attempts[first - 1][0]["steps"] == attempts[last][0]["steps"] and attempts[first - 1][-1]["event"] != "run_done":
        first -= 1
    return attempts[first : last + 1]


def _step(run: Run, name: str, *, made: bool) -> dict[str, Any]:
    manifest = run.manifests[name]
    summary = manifest["summary"]
    shares = time_shares(run.path / "artifacts" / name, manifest)
    return (
        {"status": "done" if made else "reused", "elapsed_s": manifest["elapsed_s"], "artifact": f"{name}-{manifest['key'][:12]}"}
        | {"tokens": 0}
        | {key: summary[key] for key in ("tokens", "peak_memory_gib") if key in summary}
        | ({"time_s": shares} if shares else {})
    )


def _domain(name: str, run: Run) -> dict[str, Any]:
    sources = {"base": "base", "sft": f"sft-{name}", "expert": f"grpo-{name}", "student": "distill"}
    found: dict[str, Any] = {}
    passed: dict[str, np.ndarray] = {}
    for level, step in sources.items():
        evaluation = run.manifests.get(step, {}).get("summary", {}).get("evaluation", {}).get(name)
        if evaluation is not None:
            found[level] = {key: evaluation[key] for key in ("pass@1", "n", "ci95")}
            passed[level] = np.array([np.nan if value is None else value for value in evaluation["passed"]], dtype=np.float64)
    if "sft" in passed and "expert" in passed:
        found["grpo_gain"] = found["expert"]["pass@1"] - found["sft"]["pass@1"]
        found["grpo_gain_ci95"] = gain_interval(passed["sft"], passed["expert"])
    if {"base", "expert", "student"} <= passed.keys():
        base, expert, student = (found[level]["pass@1"] for level in ("base", "expert", "student"))
        found["recovery"] = (student - base) / (expert - base) if expert > base else None
        found["recovery_ci95"] = recovery_interval(passed["base"], passed["expert"], passed["student"])
    return found


def _resampled(*columns: np.ndarray) -> np.ndarray:
    """Resample prompts, the same ones for every column, and return each column's means: [columns, RESAMPLES]."""
    table = np.stack(columns)
    table = table[:, ~np.isnan(table).any(axis=0)]  # A prompt whose verifier failed on one side says nothing on any.
    if table.shape[1] == 0:
        return np.full((len(columns), RESAMPLES), np.nan)
    draws = np.random.default_rng(0).integers(0, table.shape[1], size=(RESAMPLES, table.shape[1]))
    return np.stack([column[draws].mean(axis=1) for column in table])


def gain_interval(before: np.ndarray, after: np.ndarray) -> list[float]:
    """Paired bootstrap 95 % interval of the difference of two means over the same prompts; [0/1 or nan a prompt] each."""
    first, second = _resampled(before, after)
    return [round(float(q), 6) for q in np.quantile(second - first, [0.025, 0.975])]


def recovery_interval(base: np.ndarray, expert: np.ndarray, student: np.ndarray) -> list[float] | None:
    """Paired bootstrap 95 % interval of (student - base) / (expert - base); None where some resamples have nothing to recover."""
    low, high, kept = _resampled(base, expert, student)
    if not (high > low).all():
        return None
    return [round(float(q), 6) for q in np.quantile((kept - low) / (high - low), [0.025, 0.975])]


def write_report(run_dir: Path, *, tracking: TrackingConfig | None = None) -> RenderableType:
    """Write `report.json`, `report.html` and `report.svg`, send the recovery table to W&B, and return the closing table for the terminal.

    Args:
        run_dir: of the run.
        tracking: where the table goes besides; None sends it nowhere.
    """
    # Imported here: matplotlib is slow to load and wanted only at the end.
    from pipeline.page import page, picture

    run = read_run(run_dir)
    report = summarize(run)
    (run_dir / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    (run_dir / "report.html").write_text(page(run, report))
    (run_dir / "report.svg").write_text(picture(run, report))
    sink = open_wandb(tracking, run_dir=run_dir, group=report["run"], step="report", values=run.config) if tracking else None
    if sink is not None:
        rows = [
            [name, *(found.get(level, {}).get("pass@1") for level in LEVELS), found.get("recovery")]
            for name, found in report["domains"].items()
        ]
        sink.table("recovery", ["domain", *LEVELS, "recovery"], rows)
        sink.finish({key: report[key] for key in ("domains", "mean_recovery", "elapsed_s", "peak_rss_gib") if report[key] is not None})
    return _closing(report, run_dir)


def _closing(report: dict[str, Any], run_dir: Path) -> RenderableType:
    domains = Table(
        box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim", title="pass@1 on held-out prompts", title_justify="left"
    )
    for title in ("domain", "base", "SFT", "expert", "GRPO gain", "student", "recovery"):
        domains.add_column(title, justify="left" if title == "domain" else "right", no_wrap=True)
    for name, found in report["domains"].items():
        levels = [percent(found.get(level)) for level in LEVELS]
        gain = f"{found['grpo_gain']:+.1%} {_range(found['grpo_gain_ci95'])}" if "grpo_gain" in found else ""
        recovery = "" if found.get("recovery") is None else f"{found['recovery']:.1%} {_range(found['recovery_ci95'])}"
        domains.add_row(Text(name, style="bold"), *levels[:3], gain, Text(levels[3], style="bold"), Text(recovery, style="bold green"))
    if report["mean_recovery"] is not None:
        domains.add_row(Text("mean", style="dim"), "", "", "", "", "", Text(f"{report['mean_recovery']:.1%}", style="bold green"))
    if len(report["mean_over_domains"]) > 1:
        means = ", ".join(f"{name} {mean:.1%}" for name, mean in report["mean_over_domains"].items())
        domains.caption = f"mean over all domains: {means}"
    steps = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="dim")
    for title in ("step", "", "time", "tokens", "memory"):
        steps.add_column(title, justify="right" if title in ("time", "tokens", "memory") else "left", no_wrap=True)
    for name, step in report["steps"].items():
        memory = f"{step['peak_memory_gib']:.2f} GiB" if "peak_memory_gib" in step else ""
        steps.add_row(name, step["status"], duration(step["elapsed_s"]), f"{step['tokens']:,}", memory)
    total = f"{duration(report['elapsed_s'])}, peak memory of all processes {report['peak_rss_gib']:.2f} GiB"
    shares = describe_shares(report["steps"].values())
    where = Text(f"report  {run_dir / 'report.html'}", no_wrap=True, overflow="ignore")
    return Group(Text(), domains, Text(), steps, Text(), *([Text(shares)] if shares else []), Text(total), where)


def percent(found: dict[str, Any] | None) -> str:
    """Write a pass@1 as `93.5%`, nothing where there is none."""
    return f"{found['pass@1']:.1%}" if found else ""


def _range(interval: list[float] | None) -> str:
    return f"[{100 * interval[0]:.0f}, {100 * interval[1]:.0f}]" if interval else ""


def show(config: RunConfig) -> int:
    """Write the report of a run again and print it; returns the exit code.

    Raises:
        UsageError: there is no such run.
    """
    Console().print(write_report(Path(config.output_dir).resolve() / "runs" / run_name(config)))
    return 0
