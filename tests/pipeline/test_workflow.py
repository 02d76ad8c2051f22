"""The workflow reuses, resumes and fails as promised; steps run in this process, Ray has its own test."""

import io
import json

import pytest
from rich.console import Console

from domains.config import SandboxConfig
from pipeline.artifacts import Journal, Store, digest
from pipeline.execute import Settings, execute
from pipeline.failure import StepFailed, describe, root_cause
from pipeline.live import Live
from pipeline.stages import Step
from pipeline.workflow import Workflow
from runtime.config import ClusterConfig, EngineConfig, TrackingConfig
from runtime.tracking import read_metrics


class Here:
    """Runs steps at once in the calling process."""

    def __init__(self, settings):
        self.settings, self.ended, self.order = settings, [], []

    def submit(self, step, inputs):
        self.order.append(step.name)
        try:
            self.ended.append((step, execute(step, inputs, self.settings)))
        except RuntimeError as error:
            self.ended.append((step, error))

    def wait(self, timeout_s):
        ended, self.ended = self.ended, []
        return ended

    def cancel(self):
        raise AssertionError("nothing to cancel")


@pytest.fixture
def settings(tmp_path):
    run_dir = tmp_path / "runs" / "toy"
    (run_dir / "logs").mkdir(parents=True)
    shared = {"cluster": ClusterConfig(), "engine": EngineConfig(), "sandbox": SandboxConfig(), "tracking": TrackingConfig(wandb="off")}
    return Settings(run_dir=run_dir, artifacts=tmp_path / "artifacts", run="toy", seed=3, values={}, **shared)


def count_to(context, job):
    """Count to 4, saving every count; die after `job["dies_at"]` counts."""
    saved = context.workdir / "count"
    start = int(saved.read_text()) if saved.exists() else 0
    context.tracker.resume_from(start)
    for step in range(start, 4):
        context.tracker.log(step, {"reward/mean": float(step), "started_at": float(start)})
        if step == job.get("dies_at") and start == 0:
            raise RuntimeError("died")
        saved.write_text(str(step + 1))
        context.tracker.progress(step + 1, 4)
    (context.artifact / "inputs.json").write_text(json.dumps({name: path.name for name, path in context.inputs.items()}))
    return {"steps": 4, "evaluation": {"math": {"pass@1": 0.5}}}


def chain(*names: str, **jobs: dict) -> list[Step]:
    """Steps, each needing all before it whose name it starts with a letter of: `a`, `b`, `ab` needs both."""
    made: dict[str, Step] = {}
    for name in names:
        needs = tuple(other for other in made if other != name and other in name)
        recipe = {"step": name, "job": {}, "inputs": {need: made[need].key for need in needs}}
        made[name] = Step(name, "base", needs, count_to, jobs.get(name, {}), recipe, digest(recipe))
    return list(made.values())


def workflow(settings, steps, width=2):
    store, journal = Store(settings.artifacts), Journal(settings.run_dir / "journal.jsonl")
    live = Live(settings, {s.name: store.workdir(s.name, s.key) for s in steps}, stage="all", console=Console(file=io.StringIO()))
    return Workflow(steps, store, journal, live=live, width=width)


def test_steps_run_after_their_needs_and_get_their_artifacts(settings):
    steps = chain("a", "b", "ab")
    tasks = Here(settings)
    outcomes = workflow(settings, steps).run(tasks)
    assert tasks.order == ["a", "b", "ab"]
    assert json.loads((outcomes["ab"].path / "inputs.json").read_text()) == {"a": outcomes["a"].path.name, "b": outcomes["b"].path.name}
    assert all(outcome.status == "done" and outcome.summary["steps"] == 4 for outcome in outcomes.values())


def test_a_second_run_reuses_everything(settings):
    steps = chain("a", "b", "ab")
    first = workflow(settings, steps).run(Here(settings))
    again = workflow(settings, steps)
    assert again.reuse()
    assert {name: o.path for name, o in again.outcomes.items()} == {name: o.path for name, o in first.items()}
    assert {o.status for o in again.outcomes.values()} == {"reused"}


def test_a_damaged_artifact_is_made_again(settings):
    steps = chain("a", "b", "ab")
    outcomes = workflow(settings, steps).run(Here(settings))
    (outcomes["a"].path / "inputs.json").write_text("other")
    again, tasks = workflow(settings, steps), Here(settings)
    assert not again.reuse()
    again.run(tasks)
    assert tasks.order == ["a"]


def test_an_interrupted_step_goes_on_from_its_checkpoint(settings):
    with pytest.raises(StepFailed):
        workflow(settings, chain("a", a={"dies_at": 2})).run(Here(settings))
    outcomes = workflow(settings, chain("a", a={"dies_at": 2})).run(Here(settings))
    lines = read_metrics(outcomes["a"].path / "metrics.jsonl")
    assert [(line["step"], line["started_at"]) for line in lines] == [(0, 0.0), (1, 0.0), (2, 2.0), (3, 2.0)]


def test_after_a_failure_nothing_new_starts_and_the_rest_is_kept(settings):
    tasks = Here(settings)
    flow = workflow(settings, chain("a", "b", "ab", "c", b={"dies_at": 0}))
    with pytest.raises(StepFailed) as caught:
        flow.run(tasks)
    assert tasks.order == ["a", "b"]
    assert list(flow.outcomes) == ["a"]
    said = describe(caught.value, settings, kept=["a: done"])
    assert "step b failed: RuntimeError: died" in said
    assert f"log: {settings.run_dir / 'logs' / 'b.log'}" in said
    assert 'raise RuntimeError("died")' in said
    assert "a: done" in said and "the same command goes on from there" in said
    assert "RuntimeError: died" in (settings.run_dir / "logs" / "b.log").read_text()


def test_a_full_disk_is_named_as_such(settings):
    said = describe(StepFailed([("a", OSError(28, "No space left on device"))]), settings, kept=[])
    assert "is full" in said and "nothing was kept" in said


def test_an_artifact_made_meanwhile_by_another_run_is_reused(settings):
    (step,) = chain("a")
    assert execute(step, {}, settings).status == "done"
    assert execute(step, {}, settings).status == "reused"


def test_time_of_killed_attempts_counts(settings):
    (step,) = chain("a", a={"dies_at": 2})
    with pytest.raises(RuntimeError):
        execute(step, {}, settings)
    attempts = Store(settings.artifacts).workdir(step.name, step.key) / "attempts.json"
    values = json.loads(attempts.read_text())
    attempts.write_text(json.dumps(values | {"spent_s": 50.0}))
    assert execute(step, {}, settings).elapsed_s >= 50.0


def test_the_root_cause_of_a_local_error_is_itself():
    try:
        raise ValueError("here")
    except ValueError as error:
        cause, frames = root_cause(error)
    assert cause.args == ("here",)
    assert frames[-1].endswith('raise ValueError("here")')
