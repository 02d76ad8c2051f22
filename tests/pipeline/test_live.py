"""What the user sees is right on a terminal and in a log."""

import io
import json
import time

import pytest
from rich.console import Console

from domains.config import SandboxConfig
from pipeline.execute import Outcome, Settings
from pipeline.live import Live, duration, headline, time_left
from runtime.config import ClusterConfig, EngineConfig, TrackingConfig
from runtime.tracking import Tracker


@pytest.fixture
def live(tmp_path):
    """A view of two steps; `live(terminal)` returns it with what it wrote."""

    def view(*, terminal: bool) -> tuple[Live, io.StringIO]:
        shared = {"cluster": ClusterConfig(), "engine": EngineConfig(), "sandbox": SandboxConfig(), "tracking": TrackingConfig()}
        settings = Settings(run_dir=tmp_path, artifacts=tmp_path, run="demo", seed=0, values={}, **shared)
        for name in ("grpo-math", "grpo-code"):
            (tmp_path / name).mkdir()
        out = io.StringIO()
        console = Console(file=out, force_terminal=terminal, width=120)
        return Live(settings, {name: tmp_path / name for name in ("grpo-math", "grpo-code")}, stage="all", console=console), out

    return view


def test_a_log_gets_plain_lines(live, tmp_path):
    view, out = live(terminal=False)
    with view:
        view.started("grpo-math")
        tracker = Tracker(tmp_path / "grpo-math")
        tracker.progress(0, 40)
        tracker.log(0, {"reward/mean": 0.5, "perf/tokens_per_s": 1234.0})
        tracker.progress(10, 40)
        view._last_plain -= 60
        view.refresh()
        view.ended("grpo-math", Outcome("done", tmp_path, 65.0, {"evaluation": {"math": {"pass@1": 0.955}}}))
        view.failed("grpo-code")
    said = out.getvalue()
    assert "\x1b" not in said
    assert str(tmp_path / "wandb") in said and "reference" in said
    assert "grpo-math: step 10/40" in said and "reward 0.500" in said and "1,234 tokens/s" in said
    assert "grpo-math: done (1 min 05 s), pass@1 math 96%" in said
    assert "grpo-code: failed" in said


def test_a_terminal_shows_the_experts_side_by_side(live, tmp_path):
    view, out = live(terminal=True)
    with view:
        for name in ("grpo-math", "grpo-code"):
            view.started(name)
            Tracker(tmp_path / name).progress(3, 40, "rollout")
        view.refresh()
    assert "grpo-math" in out.getvalue() and "grpo-code" in out.getvalue() and "3/40" in out.getvalue()


def test_time_left_follows_the_pace_of_the_phase():
    state = {"done": 30, "total": 40, "since_done": 10, "since": 100.0, "now": 140.0}
    assert time_left(state, now=140.0) == pytest.approx(20.0)
    assert time_left(state, now=150.0) == pytest.approx(10.0)
    assert time_left(state | {"done": 10}, now=150.0) is None


@pytest.mark.parametrize(("seconds", "said"), [(7.6, "8 s"), (185, "3 min 05 s"), (7810, "2 h 10 min")])
def test_durations_are_written_for_people(seconds, said):
    assert duration(seconds) == said


@pytest.mark.parametrize(
    ("metrics", "said"),
    [
        ({"reward/mean": 0.25, "actor/loss": 1.0}, "reward 0.250"),
        ({"distill/reverse_kl": 0.5}, "reverse KL 0.500"),
        ({"sft/loss": 2.0}, "loss 2.000"),
        ({}, ""),
    ],
)
def test_the_headline_is_the_number_that_matters(metrics, said):
    assert headline(metrics) == said


def test_progress_is_readable_while_it_is_written(tmp_path):
    tracker = Tracker(tmp_path)
    for done in range(50):
        tracker.progress(done, 50)
        assert json.loads((tmp_path / "progress.json").read_text())["now"] <= time.time()
