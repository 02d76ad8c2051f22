"""A run that is killed in the middle of every stage ends with the numbers of one that is not; no Ray here."""

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parent / "chain_run.py"


def call(outputs: Path, verb: str, *, kill: str = "", full: str = "") -> subprocess.CompletedProcess:
    """Run the command line over a chain of dependent numbers."""
    arguments = [
        sys.executable,
        str(PROGRAM),
        verb,
        "+stage=all",
        f"output_dir={outputs}",
        "tracking=off",
        "~domains.code",
        "~domains.agent",
    ]
    environment = os.environ | {"CHAIN_KILL": kill, "CHAIN_FULL": full}
    return subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False, timeout=60)


def numbers(outputs: Path) -> dict:
    """What a report says, but for times, memory, and who made a step."""
    report = json.loads((outputs / "runs" / "all" / "report.json").read_text())
    kept = {name: (step["tokens"], step["artifact"]) for name, step in report["steps"].items()}
    return {"domains": report["domains"], "mean_recovery": report["mean_recovery"], "steps": kept}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> dict:
    """Numbers of a run that nobody disturbed."""
    outputs = tmp_path_factory.mktemp("uninterrupted")
    done = call(outputs, "run")
    assert done.returncode == 0, done.stderr
    return numbers(outputs)


def test_kills_in_every_stage_change_no_number(tmp_path, uninterrupted):
    for step in ("base", "sft-math", "grpo-math", "distill"):
        assert call(tmp_path, "run", kill=f"{step}:4").returncode == -9
    said = call(tmp_path, "plan").stdout
    states = {line.split()[0]: line.split()[1:5] for line in said.splitlines() if line[:1].isalpha()}
    assert states["base"][0] == "done" and states["distill"] == ["resumable", "at", "step", "3"]
    assert call(tmp_path, "run").returncode == 0
    assert numbers(tmp_path) == uninterrupted
    for path in tmp_path.glob("artifacts/*/metrics.jsonl"):
        assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == list(range(9))


def test_a_kill_before_the_first_checkpoint_starts_over(tmp_path, uninterrupted):
    assert call(tmp_path, "run", kill="base:1").returncode == -9
    said = call(tmp_path, "plan").stdout
    base = next(line for line in said.splitlines() if line.startswith("base"))
    assert "to do" in base and "interrupted before its first checkpoint" in base
    assert call(tmp_path, "run").returncode == 0
    assert numbers(tmp_path) == uninterrupted


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_used(tmp_path, uninterrupted):
    assert call(tmp_path, "run", kill="base:7").returncode == -9
    (newest,) = tmp_path.glob("artifacts/.work/base-*/checkpoints/step-000006")
    (newest / "weights").write_text("damaged")
    assert call(tmp_path, "run").returncode == 0
    assert numbers(tmp_path) == uninterrupted
    assert "damaged" in (tmp_path / "runs" / "all" / "logs" / "base.log").read_text()


def test_a_full_disk_is_named_with_what_was_kept(tmp_path, uninterrupted):
    done = call(tmp_path, "run", full="sft-math")
    assert done.returncode == 1
    assert "error: step sft-math failed: OSError: [Errno 28] No space left on device" in done.stderr
    assert "is full; free some space, nothing half-written was committed" in done.stderr
    assert "base: done" in done.stderr and "sft-math: goes on from" in done.stderr
    assert "warmup: done" in done.stderr, "what ran beside it was finished"
    assert not list(tmp_path.glob("artifacts/grpo-*"))
    assert call(tmp_path, "run").returncode == 0
    assert numbers(tmp_path) == uninterrupted


def test_the_same_run_twice_at_once_is_refused(tmp_path):
    folder = tmp_path / "runs" / "all"
    folder.mkdir(parents=True)
    with (folder / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        done = call(tmp_path, "run")
    assert done.returncode == 2
    assert done.stderr == f"error: run: {folder} is being made by another process; wait for it, or give this one a name: run=...\n"
