"""A checkpoint is whole or absent; damage is named, set aside, and the one before it used."""

import os
import signal
import subprocess
import sys

import pytest

from runtime import checkpoint


def commit(directory, step):
    return checkpoint.commit(
        directory, step, write=lambda d: (d / "weights").write_bytes(bytes([step]) * 1000), state={"cursor": step * 10}
    )


def test_newest_valid_checkpoint_wins_and_damage_is_set_aside(tmp_path, caplog):
    for step in (1, 2, 3):
        commit(tmp_path, step)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000002", "step-000003"]
    (tmp_path / "step-000003" / "weights").write_bytes(b"torn")
    path, state = checkpoint.newest(tmp_path)
    assert path.name == "step-000002" and state == {"step": 2, "cursor": 20}
    assert (tmp_path / "step-000003.corrupt").exists()
    assert "weights" in caplog.text and "step-000003" in caplog.text


@pytest.mark.parametrize("damage", ["flip", "manifest", "missing"])
def test_every_kind_of_damage_is_found(tmp_path, damage):
    path = commit(tmp_path, 1)
    if damage == "flip":
        data = bytearray((path / "weights").read_bytes())
        data[500] ^= 1
        (path / "weights").write_bytes(data)
    elif damage == "manifest":
        (path / checkpoint.MANIFEST).write_text("{")
    else:
        (path / "state.json").unlink()
    with pytest.raises(ValueError, match="damaged"):
        checkpoint.verify(path)
    assert checkpoint.newest(tmp_path) is None


def test_a_failing_write_commits_nothing(tmp_path):
    commit(tmp_path, 1)

    def fail(directory):
        (directory / "weights").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        checkpoint.commit(tmp_path, 2, write=fail, state={})
    assert checkpoint.newest(tmp_path)[1]["step"] == 1


KILLED = """
import os, signal, sys
from pathlib import Path
from runtime import checkpoint
calls, stop = 0, int(sys.argv[2])
def dying(function):
    def call(*args, **kwargs):
        global calls
        calls += 1
        if calls == stop:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return call
os.fsync, os.rename, os.open = dying(os.fsync), dying(os.rename), dying(os.open)
checkpoint.commit(Path(sys.argv[1]), 2, write=lambda d: (d / "weights").write_bytes(b"2" * 1000), state={"cursor": 20})
"""


def test_a_kill_at_every_flush_and_rename_leaves_the_old_or_the_new_checkpoint(tmp_path):
    outcomes = []
    for stop in range(1, 40):
        directory = tmp_path / str(stop)
        commit(directory, 1)
        result = subprocess.run([sys.executable, "-c", KILLED, str(directory), str(stop)], check=False, capture_output=True, text=True)
        outcomes.append(checkpoint.newest(directory)[1]["step"])
        assert not list(directory.glob("*.corrupt"))
        if result.returncode == 0:
            break
        assert result.returncode == -signal.SIGKILL, result.stderr
    assert result.returncode == 0, "the saver never ran to its end"
    assert outcomes == sorted(outcomes) and outcomes[0] == 1 and outcomes[-1] == 2
    assert os.listdir(tmp_path / "1")
