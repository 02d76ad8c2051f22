"""Artifacts are there whole or not at all, and damaged ones are set aside."""

import json
import multiprocessing
import os

import pytest

from pipeline.artifacts import Journal, Store, differences, verify

KEY = "a" * 64


def committed(store: Store, key: str = KEY, recipe: dict | None = None):
    made = store.workdir("sft-math", key) / "artifact"
    (made / "inner").mkdir(parents=True)
    (made / "weights.bin").write_bytes(bytes(range(256)) * 10)
    (made / "inner" / "tokenizer.json").write_text("{}")
    return store.commit("sft-math", key, {"recipe": recipe or {}, "inputs": {}, "summary": {"tokens": 5}, "elapsed_s": 1.5})


def test_a_committed_artifact_is_found_again_and_its_work_directory_is_gone(tmp_path):
    store = Store(tmp_path)
    assert store.find("sft-math", KEY) is None
    artifact = committed(store)
    found = store.find("sft-math", KEY)
    assert found is not None and found.path == artifact.path == tmp_path / f"sft-math-{KEY[:12]}"
    assert found.manifest["summary"] == {"tokens": 5}
    assert sorted(entry["path"] for entry in found.manifest["files"]) == ["inner/tokenizer.json", "weights.bin"]
    assert not store.workdir("sft-math", KEY).exists()


def flip(path):
    data = bytearray(path.read_bytes())
    data[7] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: flip(path / "weights.bin"),
        lambda path: (path / "weights.bin").unlink(),
        lambda path: (path / "weights.bin").write_bytes(b"short"),
        lambda path: (path / "manifest.json").unlink(),
        lambda path: (path / "manifest.json").write_text('{"schema": 1, "key'),
    ],
    ids=["a flipped bit", "a missing file", "a short file", "no manifest", "a torn manifest"],
)
def test_a_damaged_artifact_is_set_aside_by_name(tmp_path, caplog, damage):
    store = Store(tmp_path)
    for number in ("", "2"):
        path = committed(store).path
        damage(path)
        assert store.find("sft-math", KEY) is None
        assert not path.exists()
        assert path.with_name(f"{path.name}.corrupt{number}").is_dir()
    assert ".corrupt" in caplog.text and str(path) in caplog.text


def test_a_plan_leaves_a_damaged_artifact_where_it_is(tmp_path):
    store = Store(tmp_path)
    path = committed(store).path
    (path / "weights.bin").unlink()
    assert store.find("sft-math", KEY, thorough=False) is None
    assert path.exists()


def test_a_commit_that_fails_leaves_no_artifact_and_keeps_the_work(tmp_path, monkeypatch):
    store = Store(tmp_path)

    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(OSError, match="No space"):
        committed(store)
    monkeypatch.undo()
    assert store.find("sft-math", KEY) is None
    assert (store.workdir("sft-math", KEY) / "artifact" / "weights.bin").exists()


def test_another_key_is_not_accepted(tmp_path):
    path = committed(Store(tmp_path)).path
    with pytest.raises(ValueError, match="expected schema 1 and key b"):
        verify(path, "b" * 64)


def test_the_nearest_artifact_differs_in_fewest_keys(tmp_path):
    store = Store(tmp_path)
    committed(store, "1" * 64, {"job": {"steps": 10, "lr": 0.1}, "seed": 0})
    committed(store, "2" * 64, {"job": {"steps": 40, "lr": 0.2}, "seed": 1})
    near = store.nearest("sft-math", {"job": {"steps": 20, "lr": 0.1}, "seed": 0})
    assert near is not None
    assert near[0].manifest["key"] == "1" * 64
    assert near[1] == ["job.steps: 10 -> 20"]
    assert store.nearest("sft", {}) is None


def test_differences_names_leaves_that_one_side_lacks():
    assert differences({"a": 1, "b": {"c": 2}}, {"b": {"c": 3}, "d": [1]}) == ["a: 1 -> null", "b.c: 2 -> 3", "d: null -> [1]"]


def hold(root, ready, let_go):
    with Store(root).lock("base", KEY, waiting=lambda: None):
        ready.set()
        let_go.wait(20)


def test_the_lock_is_held_against_others_and_dies_with_its_holder(tmp_path):
    context = multiprocessing.get_context("fork")
    ready, let_go = context.Event(), context.Event()
    holder = context.Process(target=hold, args=(tmp_path, ready, let_go))
    holder.start()
    assert ready.wait(20)
    said = []

    def waiting():
        said.append("waiting")
        holder.kill()

    with Store(tmp_path).lock("base", KEY, waiting=waiting):
        assert said == ["waiting"]
    holder.join()


def test_the_journal_drops_a_torn_last_line(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl")
    journal.write("step_started", step="base")
    journal.write("step_done", step="base")
    with journal.path.open("a") as file:
        file.write('{"time": 1, "eve')
    assert [event["event"] for event in journal.read()] == ["step_started", "step_done"]
    assert all(json.loads(line)["time"] > 0 for line in journal.path.read_text().splitlines()[:2])
