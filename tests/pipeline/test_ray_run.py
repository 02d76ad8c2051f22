"""One whole run under Ray, with toy steps: killed, failed, interrupted, resumed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

TOY_RUN = Path(__file__).parent / "toy_run.py"


def start(outputs: Path, *overrides: str, verb: str = "run", **toy) -> subprocess.Popen:
    """Start the command line over toy steps."""
    arguments = [
        sys.executable,
        str(TOY_RUN),
        verb,
        "+stage=all",
        f"output_dir={outputs}",
        "tracking=off",
        "cluster.dashboard=false",
        *overrides,
    ]
    environment = os.environ | {"TOY": json.dumps(toy)}
    return subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def wait_for_count(outputs: Path, at_least: int) -> None:
    """Wait until some step has counted so far."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if any(int(path.read_text() or 0) >= at_least for path in outputs.glob("artifacts/.work/*/count")):
            return
        time.sleep(0.05)
    raise AssertionError("no step got that far")


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, str]:
    """A run whose driver was killed in its first step and started again."""
    outputs = tmp_path_factory.mktemp("ray")
    killed = start(outputs, "base.steps=50", sleep_s=0.3)
    wait_for_count(outputs, 3)
    left = [
        p for p in psutil.Process(killed.pid).children(recursive=True) if not p.name().endswith("Agent")
    ]  # Ray's own say farewell for 60 s
    killed.kill()
    killed.communicate()
    assert len(left) > 3
    assert not psutil.wait_procs(left, timeout=20)[1]
    again = start(outputs, "base.steps=50")
    out, error = again.communicate(timeout=120)
    assert again.returncode == 0, error
    return outputs, out


def test_a_killed_driver_resumes_where_the_checkpoint_is(finished):
    outputs, _ = finished
    (base,) = outputs.glob("artifacts/base-*")
    starts = [int(line) for line in (base / "starts.txt").read_text().split()]
    assert starts[0] == 0 and starts[-1] >= 3
    assert [json.loads(line)["step"] for line in (base / "metrics.jsonl").read_text().splitlines()] == list(range(50))


def test_the_run_directory_holds_configuration_journal_links_and_report(finished):
    outputs, out = finished
    run = outputs / "runs" / "all"
    events = [json.loads(line)["event"] for line in (run / "journal.jsonl").read_text().splitlines()]
    assert events.count("run_started") == 2 and events[-1] == "run_done"
    assert sorted(path.name for path in (run / "artifacts").iterdir())[:2] == ["base", "distill"]
    assert all((link / "manifest.json").is_file() for link in (run / "artifacts").iterdir())
    report = json.loads((run / "report.json").read_text())
    assert report["mean_recovery"] == 1.0
    assert report["peak_rss_gib"] > 0
    assert str(run / "report.html") in out.replace("\n", "")
    assert "reused" not in out.split("pass@1 on held-out")[0].replace("base: reused", "")


def test_the_same_command_again_reuses_all_without_ray(finished):
    outputs, _ = finished
    before = json.loads((outputs / "runs" / "all" / "report.json").read_text())
    started = time.monotonic()
    again = start(outputs, "base.steps=50")
    out, _ = again.communicate(timeout=60)
    assert again.returncode == 0
    assert time.monotonic() - started < 10
    assert out.count(": reused") == 9
    after = json.loads((outputs / "runs" / "all" / "report.json").read_text())
    assert after == before


def test_a_failed_step_is_explained_and_the_others_are_kept(finished):
    outputs, _ = finished
    process = start(outputs, "base.steps=4", "run=broken", fail="sft-math")
    _, error = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "error: step sft-math failed: RuntimeError: the toy broke" in error
    assert 'raise RuntimeError("the toy broke")' in error
    assert "sft-math: goes on from" in error and "base: done" in error


def test_an_interrupt_leaves_130_and_says_that_the_command_resumes(tmp_path):
    process = start(tmp_path, "base.steps=90", sleep_s=0.2)
    wait_for_count(tmp_path, 2)
    os.kill(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command goes on where it stopped" in error
    events = [json.loads(line)["event"] for line in (tmp_path / "runs" / "all" / "journal.jsonl").read_text().splitlines()]
    assert events[-1] == "interrupted"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("cluster.expert_ranks=64", "cluster.expert_ranks: 64 ranks x"),
        ("cluster.address=127.0.0.1:1", "cluster.address: got '127.0.0.1:1', but nothing answers there"),
    ],
    ids=["more than there is", "nothing there"],
)
def test_a_cluster_that_cannot_hold_the_run_is_refused(tmp_path, override, said):
    process = start(tmp_path, override)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 2
    assert error.startswith("error: ") and error.count("\n") == 1 and said in error
    assert "started, log" not in out
