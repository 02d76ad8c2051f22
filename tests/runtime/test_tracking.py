"""Metrics on disk are the truth: whole lines, none twice, secrets nowhere."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.config import TrackingConfig
from runtime.tracking import Tracker, open_wandb, read_metrics, redact


class Sink:
    """Keeps what would go to W&B."""

    def __init__(self):
        self.lines, self.summary = [], None

    def log(self, line):
        self.lines.append(line)

    def finish(self, summary):
        self.summary = summary


def test_each_call_is_one_line(tmp_path):
    sink = Sink()
    tracker = Tracker(tmp_path, sink)
    tracker.log(0, {"reward/mean": 0.5})
    tracker.log(1, {"reward/mean": float("nan"), "loss": 2})
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 0, "reward/mean": 0.5}, {"step": 1, "reward/mean": None, "loss": 2.0}]
    assert sink.lines == read_metrics(tmp_path / "metrics.jsonl")


def test_resuming_forgets_what_came_after_the_checkpoint_and_tells_the_sink(tmp_path):
    first = Tracker(tmp_path)
    for step in range(5):
        first.log(step, {"loss": step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    sink = Sink()
    second = Tracker(tmp_path, sink)
    second.resume_from(3)
    second.log(3, {"loss": 30})
    assert [(line["step"], line["loss"]) for line in read_metrics(tmp_path / "metrics.jsonl")] == [(0, 0), (1, 1), (2, 2), (3, 30)]
    assert [line["step"] for line in sink.lines] == [0, 1, 2, 3]


def test_a_broken_line_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\nnonsense\n{"step": 1}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: got 'nonsense'"):
        read_metrics(path)


def test_a_new_note_starts_a_new_phase(tmp_path):
    tracker = Tracker(tmp_path)
    tracker.progress(5, 40)
    tracker.progress(9, 40)
    assert json.loads((tmp_path / "progress.json").read_text())["since_done"] == 5
    tracker.progress(0, 200, "evaluating")
    assert json.loads((tmp_path / "progress.json").read_text()) | {"now": 0, "since": 0, "metrics": 0} == {
        "done": 0, "total": 200, "note": "evaluating", "since_done": 0, "since": 0, "now": 0, "metrics": 0,
    }  # fmt: skip


def test_secrets_are_blanked_at_any_depth():
    values = {"seed": 1, "api_key": "x", "inner": [{"hf_token": "y", "row_tokens": 3, "tokens_per_step": 4}], "password": "z"}
    assert redact(values) == {
        "seed": 1,
        "api_key": "***",
        "inner": [{"hf_token": "***", "row_tokens": 3, "tokens_per_step": 4}],
        "password": "***",
    }


def test_off_never_imports_wandb(tmp_path):
    program = (
        "import sys; from pathlib import Path; from runtime.config import TrackingConfig; from runtime.tracking import open_wandb;"
        f"assert open_wandb(TrackingConfig(wandb='off'), run_dir=Path({str(tmp_path)!r}), group='g', step='base', values={{}}) is None;"
        "print('wandb' in sys.modules)"
    )
    root = Path(__file__).parent.parent.parent
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=root).stdout.strip() == "False"


def test_offline_writes_beside_the_run(tmp_path):
    sink = open_wandb(TrackingConfig(), run_dir=tmp_path, group="all", step="sft-math", values={"seed": 0})
    assert sink is not None
    tracker = Tracker(tmp_path, sink)
    tracker.log(0, {"loss": 1.0})
    sink.table("recovery", ["domain", "recovery"], [["math", 0.97]])
    tracker.finish({"evaluation": {"math": {"pass@1": 0.5, "passed": [0, 1]}}})
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
