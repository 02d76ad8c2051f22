"""Run one step where its checkpoints are, and commit what it made; knows nothing of Ray."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from domains.config import SandboxConfig
from pipeline.artifacts import Artifact, Store
from pipeline.stages import Step
from runtime.config import ClusterConfig, EngineConfig, TrackingConfig
from runtime.step import StepContext
from runtime.tracking import METRICS, PROGRESS, Tracker, open_wandb

logger = logging.getLogger(__name__)

ATTEMPTS = "attempts.json"


@dataclass(frozen=True)
class Settings:
    """What all steps of a run share, none of which changes a result but `seed` (and what `stages` keeps of engine and sandbox).

    Attributes:
        run_dir: absolute path of the run's directory.
        artifacts: absolute path of the store.
        run: name of the run.
        cluster: resources of one step.
        engine: how ranks train.
        sandbox: limits for model-written code.
        tracking: where metrics go besides our own files.
        seed: of the run.
        values: the run's resolved configuration, for W&B.
    """

    run_dir: Path
    artifacts: Path
    run: str
    cluster: ClusterConfig
    engine: EngineConfig
    sandbox: SandboxConfig
    tracking: TrackingConfig
    seed: int
    values: dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """What became of a step.

    Attributes:
        status: `done` (made now) or `reused` (somebody made it before).
        path: its artifact.
        elapsed_s: time it took to make, over all attempts.
        summary: what the step returned.
        waited: another run was making it meanwhile.
    """

    status: str
    path: Path
    elapsed_s: float
    summary: dict[str, Any]
    waited: bool = False


def reused(artifact: Artifact, *, waited: bool = False) -> Outcome:
    """Describe an artifact that was there already."""
    return Outcome("reused", artifact.path, artifact.manifest["elapsed_s"], artifact.manifest["summary"], waited)


def execute(step: Step, inputs: dict[str, Path], settings: Settings) -> Outcome:
    """Run a step, or take its artifact if another run committed it first.

    Args:
        step: what to run.
        inputs: artifact directories of its needs, by step name.
        settings: what the run's steps share.

    Raises:
        OSError: the disk is full; what the step had saved stays.
        Exception: whatever the step raised; its work directory stays for the next attempt.
    """
    store, waits = Store(settings.artifacts), _Waiting(step.name)
    with _log_to(settings.run_dir / "logs" / f"{step.name}.log"):
        with store.lock(step.name, step.key, waiting=waits):
            if found := store.find(step.name, step.key):
                logger.info("%s: reused %s", step.name, found.path)
                return reused(found, waited=waits.waited)
            try:
                return _make(step, inputs, settings)
            except BaseException:
                logger.exception("%s failed", step.name)
                raise


class _Waiting:
    """Says once that another run holds the step, and remembers it."""

    def __init__(self, step: str) -> None:
        self.step = step
        self.waited = False

    def __call__(self) -> None:
        self.waited = True
        logger.warning("%s: another run is making it; waiting, then reusing it", self.step)


def _make(step: Step, inputs: dict[str, Path], settings: Settings) -> Outcome:
    store = Store(settings.artifacts)
    workdir = store.workdir(step.name, step.key)
    artifact = workdir / "artifact"
    # What a killed attempt left half-written under `artifact` is nobody's; its checkpoints lie beside it and stay.
    if artifact.exists():
        shutil.rmtree(artifact)
    artifact.mkdir(parents=True)
    spent, started = _attempt(workdir), time.time()
    sink = open_wandb(settings.tracking, run_dir=settings.run_dir, group=settings.run, step=step.name, values=settings.values)
    tracker = Tracker(workdir, sink)
    context = StepContext(
        name=step.name,
        workdir=workdir,
        artifact=artifact,
        inputs=inputs,
        tracker=tracker,
        cluster=_cluster_of(step, settings.cluster),
        engine=settings.engine,
        sandbox=settings.sandbox,
        seed=settings.seed,
    )
    logger.info("%s: started in %s", step.name, workdir)
    summary = json.loads(json.dumps(step.run(context, step.job)))
    tracker.finish(summary)
    elapsed_s = round(spent + time.time() - started, 3)
    if (workdir / METRICS).exists():
        shutil.copyfile(workdir / METRICS, artifact / METRICS)
    manifest = {"recipe": step.recipe, "inputs": step.recipe["inputs"], "summary": summary, "elapsed_s": elapsed_s}
    committed = store.commit(step.name, step.key, manifest)
    logger.info("%s: committed %s after %.1f s", step.name, committed.path, elapsed_s)
    return Outcome("done", committed.path, elapsed_s, summary)


def _cluster_of(step: Step, cluster: ClusterConfig) -> ClusterConfig:
    """Give a step that shares the cluster with others the ranks meant for those."""
    return replace(cluster, ranks=cluster.expert_ranks) if step.kind in ("sft", "grpo", "warmup") else cluster


def _attempt(workdir: Path) -> float:
    """Note that an attempt starts now and return the seconds that earlier ones, killed, had spent."""
    path, spent = workdir / ATTEMPTS, 0.0
    if path.exists():
        before = json.loads(path.read_text())
        last_sign = (workdir / PROGRESS).stat().st_mtime if (workdir / PROGRESS).exists() else before["started"]
        spent = before["spent_s"] + max(0.0, last_sign - before["started"])
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({"spent_s": spent, "started": time.time()}))
    temporary.replace(path)
    return spent


@contextmanager
def _log_to(path: Path) -> Iterator[None]:
    """Send this process's log to a file while a step runs in it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root, level = logging.getLogger(), logging.getLogger().level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
        handler.close()
