"""The report's numbers come from the manifests, its intervals from paired resampling."""

import json

import numpy as np
import pytest
import yaml
from rich.console import Console

from pipeline.artifacts import Journal
from pipeline.page import page, picture
from pipeline.report import gain_interval, read_run, recovery_interval, summarize, write_report

LEVELS = {"base": 20, "sft-math": 120, "grpo-math": 180, "distill": 172}


def evaluation(passed: list[int | None]) -> dict:
    graded = [value for value in passed if value is not None]
    mean = sum(graded) / len(graded)
    return {"pass@1": mean, "n": len(graded), "ci95": [max(0.0, mean - 0.04), min(1.0, mean + 0.04)], "passed": passed}


@pytest.fixture
def run_dir(tmp_path, configure):
    """A finished run of one domain."""
    path = tmp_path / "outputs" / "runs" / "all"
    path.mkdir(parents=True)
    config = {
        "stage": "all",
        "seed": 0,
        "domains": {"math": {}},
        "model": {"num_hidden_layers": 4, "hidden_size": 128, "n_routed_experts": 8},
    }
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    for name, passes in LEVELS.items():
        artifact = path / "artifacts" / name
        artifact.mkdir(parents=True)
        summary = {"evaluation": {"math": evaluation([int(i < passes) for i in range(200)])}, "tokens": 1234}
        (artifact / "manifest.json").write_text(json.dumps({"step": name, "key": "k" * 64, "summary": summary, "elapsed_s": 12.5}))
        lines = [{"step": i, "reward/mean": i / 10, "distill/reverse_kl": 1 / (i + 1)} for i in range(10)]
        (artifact / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    attempt(path, "step_done", "run_done")
    return path


def attempt(path, *events, at=1000.0, steps=tuple(LEVELS)):
    """Append an attempt of 10 seconds to the journal."""
    lines = [{"event": "run_started", "time": at, "steps": [{"step": name, "key": "k"} for name in steps]}]
    lines += [{"event": "step_started", "time": at, "step": "base"}] if "step_done" in events else []
    lines += [{"event": event, "time": at + 10, "step": "base", "peak_rss_gib": at / 1000} for event in events]
    with (path / "journal.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def test_numbers_come_from_the_manifests(run_dir):
    report = summarize(read_run(run_dir))
    math = report["domains"]["math"]
    assert [math[level]["pass@1"] for level in ("base", "sft", "expert", "student")] == [0.1, 0.6, 0.9, 0.86]
    assert math["recovery"] == pytest.approx(0.95)
    assert math["recovery_ci95"][0] < 0.95 < math["recovery_ci95"][1]
    assert math["grpo_gain"] == pytest.approx(0.3) and math["grpo_gain_ci95"][0] > 0
    assert report["mean_recovery"] == pytest.approx(0.95)
    assert report["elapsed_s"] == 10.0 and report["peak_rss_gib"] == 1.0
    assert report["steps"]["base"] == {"status": "done", "elapsed_s": 12.5, "tokens": 1234, "artifact": f"base-{'k' * 12}"}
    assert report["steps"]["distill"]["status"] == "reused"


def test_the_time_of_a_step_is_shared_out(run_dir, capsys):
    artifact = run_dir / "artifacts" / "grpo-math"
    lines = [{"step": i, "time/generate_s": 2.0, "time/grade_s": 0.5, "time/train_s": 1.0} for i in range(2)]
    (artifact / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    manifest = json.loads((artifact / "manifest.json").read_text())
    manifest["summary"]["evaluation"]["math"] |= {"generate_s": 1.0, "grade_s": 0.5}
    (artifact / "manifest.json").write_text(json.dumps(manifest))
    report = summarize(read_run(run_dir))
    assert report["steps"]["grpo-math"]["time_s"] == {"generate": 5.0, "grade": 1.5, "train": 2.0, "rest": 4.0}
    assert "time_s" not in report["steps"]["base"]
    assert "<td>40%</td><td>12%</td><td>16%</td>" in page(read_run(run_dir), report)
    Console(width=100).print(write_report(run_dir))
    assert "generating 40%, grading 12%, training 16%, starting, saving and waiting 32%" in capsys.readouterr().out


def test_a_stage_without_a_student_has_no_recovery(run_dir):
    (run_dir / "artifacts" / "distill" / "manifest.json").unlink()
    report = summarize(read_run(run_dir))
    assert "student" not in report["domains"]["math"] and "recovery" not in report["domains"]["math"]
    assert report["mean_recovery"] is None
    assert "<svg" in page(read_run(run_dir), report)


def test_time_adds_up_over_killed_attempts_and_ignores_reuse(run_dir):
    Journal(run_dir / "journal.jsonl").path.unlink()
    attempt(run_dir, "step_done", at=1000.0)
    attempt(run_dir, "step_done", "run_done", at=2000.0)
    attempt(run_dir, "step_reused", "run_done", at=3000.0)
    report = summarize(read_run(run_dir))
    assert report["elapsed_s"] == 20.0 and report["peak_rss_gib"] == 2.0


def test_intervals_are_paired_and_the_same_every_time():
    rng = np.random.default_rng(5)
    before = (rng.random(200) < 0.5).astype(float)
    after = np.maximum(before, rng.random(200) < 0.1)  # differs on few prompts: pairing makes the interval narrow
    low, high = gain_interval(before, after)
    assert [low, high] == gain_interval(before, after)
    assert 0 < low < (after - before).mean() < high
    assert high - low < 0.1
    shuffled = gain_interval(before, rng.permutation(after))
    assert shuffled[1] - shuffled[0] > 1.5 * (high - low)


def test_a_prompt_that_could_not_be_verified_is_left_out():
    before, after = np.array([0.0, 1.0, np.nan, 0.0] * 10), np.array([1.0, np.nan, 0.0, 1.0] * 10)
    assert gain_interval(before, after) == [1.0, 1.0]


def test_nothing_to_recover_has_no_interval():
    same = np.array([0.0, 1.0] * 20)
    assert recovery_interval(same, same, same) is None


def test_the_page_is_one_file_and_the_same_every_time(run_dir):
    write_report(run_dir)
    first = (run_dir / "report.html").read_text()
    write_report(run_dir)
    assert (run_dir / "report.html").read_text() == first
    assert "http" not in first.replace("http://www.w3.org", "").replace("http://purl.org", "").replace("http://creativecommons.org", "")
    assert "95.0%" in first and "<script" not in first
    report = json.loads((run_dir / "report.json").read_text())
    assert picture(read_run(run_dir), report).startswith("<svg")
