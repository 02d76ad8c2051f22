"""Run the graph of steps as Ray tasks: skip what is made, go on with what was interrupted, run independent steps side by side."""

from __future__ import annotations

import fcntl
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import IO, Protocol

import ray
import yaml
from ray.exceptions import RayError, RayTaskError

from pipeline import stages
from pipeline.artifacts import Journal, Store
from pipeline.config import RunConfig, run_name
from pipeline.errors import UsageError
from pipeline.execute import Outcome, Settings, execute, reused
from pipeline.failure import StepFailed, describe
from pipeline.live import Live
from pipeline.memory import MemoryWatch
from pipeline.report import write_report
from pipeline.stages import Step
from runtime import cluster
from runtime.tracking import redact

POLL_S = 0.5


class Tasks(Protocol):
    """Where steps run: Ray, or the calling thread in tests."""

    def submit(self, step: Step, inputs: dict[str, Path]) -> None:
        """Start a step."""

    def wait(self, timeout_s: float) -> list[tuple[Step, Outcome | Exception]]:
        """Return the steps that ended since the last call; waits at most `timeout_s` for the first."""

    def cancel(self) -> None:
        """End what runs; its checkpoints stay."""


class RayTasks:
    """Steps as Ray tasks that reserve nothing themselves: the rank actors they start reserve."""

    def __init__(self, settings: Settings) -> None:
        """Run steps with the settings of one run; Ray must have been started."""
        self._settings = settings
        self._execute = ray.remote(num_cpus=0, max_retries=0)(execute)
        self._running: dict[ray.ObjectRef, Step] = {}

    def submit(self, step: Step, inputs: dict[str, Path]) -> None:
        """Start a step under its own name on the dashboard."""
        self._running[self._execute.options(name=step.name).remote(step, inputs, self._settings)] = step

    def wait(self, timeout_s: float) -> list[tuple[Step, Outcome | Exception]]:
        """Return what ended: the outcome, or what Ray raised in its place."""
        ended: list[tuple[Step, Outcome | Exception]] = []
        refs, _ = ray.wait(list(self._running), num_returns=1, timeout=timeout_s)
        for ref in refs:
            step = self._running.pop(ref)
            try:
                ended.append((step, ray.get(ref)))
            except RayError as error:
                ended.append((step, error))
        return ended

    def cancel(self) -> None:
        """Kill the tasks' processes."""
        for ref in self._running:
            ray.cancel(ref, force=True)
        self._running.clear()


class Workflow:
    """One pass over the graph."""

    def __init__(self, steps: Sequence[Step], store: Store, journal: Journal, *, live: Live, width: int) -> None:
        """Prepare a pass.

        Args:
            steps: each after its needs.
            store: where artifacts are.
            journal: where transitions go.
            live: what the user sees.
            width: steps side by side, at most.
        """
        self.steps, self.store, self.journal, self.live, self.width = steps, store, journal, live, width
        self.outcomes: dict[str, Outcome] = {}

    def reuse(self) -> bool:
        """Take every artifact that is there, hashing it; True when nothing is left to run."""
        for step in self.steps:
            if found := self.store.find(step.name, step.key):
                self._ended(step, reused(found))
        return len(self.outcomes) == len(self.steps)

    def run(self, tasks: Tasks) -> dict[str, Outcome]:
        """Run what is left.

        Returns:
            The outcome of every step.

        Raises:
            StepFailed: a step failed; those that ran beside it were finished first, no other was started.
        """
        running: set[str] = set()
        failed: list[tuple[Step, Exception]] = []
        while len(self.outcomes) < len(self.steps):
            for step in self._ready(running) if not failed else []:
                running.add(step.name)
                self.journal.write("step_started", step=step.name, key=step.key)
                self.live.started(step.name)
                tasks.submit(step, {need: self.outcomes[need].path for need in step.needs})
            if not running:
                assert failed, "a step can start whenever none runs"
                break
            try:
                ended = tasks.wait(POLL_S)
            except KeyboardInterrupt:
                tasks.cancel()
                raise
            for step, outcome in ended:
                running.remove(step.name)
                if isinstance(outcome, Exception):
                    failed.append((step, outcome))
                    self._failed(step, outcome)
                else:
                    self._ended(step, outcome)
            self.live.refresh()
        if failed:
            raise StepFailed([(step.name, error) for step, error in failed])
        return self.outcomes

    def _ready(self, running: set[str]) -> list[Step]:
        waiting = [s for s in self.steps if s.name not in self.outcomes and s.name not in running]
        ready = [s for s in waiting if all(need in self.outcomes for need in s.needs)]
        return ready[: max(0, self.width - len(running))]

    def _ended(self, step: Step, outcome: Outcome) -> None:
        self.outcomes[step.name] = outcome
        event = {"done": "step_done", "reused": "step_reused"}[outcome.status]
        self.journal.write(
            event, step=step.name, key=step.key, artifact=outcome.path.name, elapsed_s=outcome.elapsed_s, waited=outcome.waited
        )
        self.live.ended(step.name, outcome)

    def _failed(self, step: Step, error: Exception) -> None:
        root = error.cause if isinstance(error, RayTaskError) else error
        self.journal.write("step_failed", step=step.name, key=step.key, error=f"{type(root).__name__}: {root}"[:500])
        self.live.failed(step.name)


def run(config: RunConfig) -> int:
    """Make what the stage needs and write the report.

    Returns:
        Exit code: 0 done, 1 a step failed, 2 Ray has not what was asked for, 130 interrupted.

    Raises:
        UsageError: another process is making the same run.
    """
    settings = _settings(config)
    steps, store = stages.steps(config), Store(settings.artifacts)
    (settings.run_dir / "logs").mkdir(parents=True, exist_ok=True)
    held = _only_one(settings.run_dir)
    (settings.run_dir / "config.yaml").write_text(yaml.safe_dump(redact(asdict(config)), sort_keys=False))
    journal = Journal(settings.run_dir / "journal.jsonl")
    journal.write("run_started", stage=config.stage, steps=[{"step": s.name, "key": s.key} for s in steps], pid=os.getpid())
    live = Live(settings, {s.name: store.workdir(s.name, s.key) for s in steps}, stage=config.stage)
    workflow = Workflow(steps, store, journal, live=live, width=1)
    previous = signal.signal(signal.SIGTERM, _interrupt)
    watch = MemoryWatch()
    try:
        with live, watch:
            if not workflow.reuse():
                _start_ray(config, workflow, settings)
                workflow.run(RayTasks(settings))
        journal.write("run_done", peak_rss_gib=watch.peak_rss_gib, peak_pss_gib=watch.peak_pss_gib)
        _link(settings.run_dir, workflow.outcomes)
        live.close_with(write_report(settings.run_dir, tracking=config.tracking))
        return 0
    except StepFailed as failure:
        journal.write("run_failed", peak_rss_gib=watch.peak_rss_gib, peak_pss_gib=watch.peak_pss_gib)
        _link(settings.run_dir, workflow.outcomes)
        print(describe(failure, settings, kept=_kept(steps, store, workflow.outcomes)), file=sys.stderr)
        return 1
    except cluster.ClusterError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        journal.write("interrupted", peak_rss_gib=watch.peak_rss_gib, peak_pss_gib=watch.peak_pss_gib)
        raise
    finally:
        signal.signal(signal.SIGTERM, previous)
        cluster.stop()
        held.close()


def _start_ray(config: RunConfig, workflow: Workflow, settings: Settings) -> None:
    workflow.live.note("starting Ray")
    info = cluster.start(config.cluster, settings.run_dir)
    fits = [info.cpus // (config.cluster.expert_ranks * config.cluster.cpus_per_rank)]
    if config.cluster.gpus_per_rank > 0:
        fits.append(info.gpus // (config.cluster.expert_ranks * config.cluster.gpus_per_rank))
    workflow.width = min([*map(int, fits), *([config.cluster.parallel_steps] if config.cluster.parallel_steps else [])])
    workflow.live.cluster_started(info, width=workflow.width)


def _settings(config: RunConfig) -> Settings:
    root = Path(config.output_dir).resolve()
    name = run_name(config)
    return Settings(
        run_dir=root / "runs" / name,
        artifacts=root / "artifacts",
        run=name,
        cluster=config.cluster,
        engine=config.engine,
        sandbox=config.sandbox,
        tracking=config.tracking,
        seed=config.seed,
        values=asdict(config),
    )


def _only_one(run_dir: Path) -> IO[str]:
    held = (run_dir / ".lock").open("w")
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        held.close()
        raise UsageError(f"run: {run_dir} is being made by another process; wait for it, or give this one a name: run=...") from error
    return held


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _link(run_dir: Path, outcomes: dict[str, Outcome]) -> None:
    """Name the artifacts that the run used, as links beside its report."""
    folder = run_dir / "artifacts"
    folder.mkdir(exist_ok=True)
    for name, outcome in outcomes.items():
        link, temporary = folder / name, folder / f".{name}.tmp"
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(os.path.relpath(outcome.path, folder))
        temporary.replace(link)


def _kept(steps: Sequence[Step], store: Store, outcomes: dict[str, Outcome]) -> list[str]:
    kept = [f"{name}: done, {outcome.path}" for name, outcome in outcomes.items()]
    for step in steps:
        workdir = store.workdir(step.name, step.key)
        if step.name not in outcomes and workdir.exists():
            kept.append(f"{step.name}: goes on from {workdir}")
    return kept
