"""One and two ranks, at every ZeRO stage, follow one loss curve with Muon stepping under DeepSpeed."""

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from model import weights

PROGRAM = Path(__file__).with_name("rank_program.py")


def outputs(model_dir, tmp_path, *options: str, ranks: int, stage: int) -> list[str]:
    """Run all ranks and return what each printed."""
    rendezvous = f"file://{tmp_path}/rendezvous-{ranks}-{stage}"
    command = [sys.executable, str(PROGRAM), str(model_dir)]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(ranks), str(stage), rendezvous, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in range(ranks)
    ]
    printed = [process.communicate(timeout=180) for process in processes]
    for rank, (process, (_, errors)) in enumerate(zip(processes, printed, strict=True)):
        assert process.returncode == 0, f"rank {rank} ended with {process.returncode}: {errors[-3000:]}"
    return [out for out, _ in printed]


def said(out: str, what: str) -> list:
    """Read what a rank printed behind a word."""
    return json.loads(out.split(f"{what} ")[1].splitlines()[0])


def sum_of_losses(printed: list[str]) -> list[float]:
    parts = [said(out, "LOSSES") for out in printed]
    return [sum(losses) for losses in zip(*parts, strict=True)]


def curve(model_dir, tmp_path, *, ranks: int, stage: int) -> list[float]:
    return sum_of_losses(outputs(model_dir, tmp_path, ranks=ranks, stage=stage))


@pytest.fixture(scope="module")
def one_rank(model_dir, tmp_path_factory):
    return curve(model_dir, tmp_path_factory.mktemp("one"), ranks=1, stage=0)


def test_the_curve_goes_down(one_rank):
    assert one_rank[4] < one_rank[0] - 0.3 and one_rank[5] < one_rank[1] - 0.3


@pytest.mark.parametrize(("ranks", "stage"), [(1, 1), (2, 0), (2, 1), (2, 2), (2, 3)], ids=str)
def test_every_layout_gives_the_same_curve(model_dir, tmp_path, one_rank, ranks, stage):
    assert curve(model_dir, tmp_path, ranks=ranks, stage=stage) == pytest.approx(one_rank, abs=2e-4)


def test_stage_3_samples_what_one_rank_samples_and_goes_on_training(model_dir, tmp_path):
    alone = outputs(model_dir, tmp_path, "sample", ranks=1, stage=1)
    both = outputs(model_dir, tmp_path, "sample", ranks=2, stage=3)
    answers = [said(out, "ANSWERS") for out in (*alone, *both)]
    assert answers[0] == answers[1] == answers[2] and all(answers[0])
    assert sum_of_losses(both) == pytest.approx(sum_of_losses(alone), abs=0.03)  # bf16


@pytest.mark.parametrize(
    ("ranks", "stage", "option"), [(1, 0, "spoil"), (2, 1, "spoil"), (2, 2, "spoil"), (1, 0, "checked"), (2, 1, "checked")], ids=str
)
def test_gradients_that_are_not_finite_change_nothing(model_dir, tmp_path, ranks, stage, option):
    printed = outputs(model_dir, tmp_path, option, ranks=ranks, stage=stage)
    assert [said(out, "SKIPPED") for out in printed] == [[[2, True]]] * ranks
    assert all(math.isfinite(loss) for loss in sum_of_losses(printed))
    for norms in (said(out, "NORMS") for out in printed):
        assert [norm is None for norm in norms] == [step == 2 or (stage, option) == (0, "spoil") for step in range(6)]


def test_norms_are_those_of_one_rank_wherever_the_gradients_lie(model_dir, tmp_path):
    alone = said(outputs(model_dir, tmp_path, ranks=1, stage=1)[0], "NORMS")
    for out in outputs(model_dir, tmp_path, "scattered", ranks=2, stage=1):
        assert said(out, "NORMS") == pytest.approx(alone, rel=1e-3)


def test_the_configuration_says_how_to_clip_and_not_the_checkpoint(model_dir, tmp_path):
    def run(stage, *actions):
        command = [
            sys.executable,
            str(PROGRAM.with_name("resume_program.py")),
            str(model_dir),
            str(stage),
            f"file://{tmp_path}/meet-{stage}",
        ]
        done = subprocess.run([*command, *actions], check=False, capture_output=True, text=True, timeout=180)
        assert done.returncode == 0, done.stderr[-3000:]
        return said(done.stdout, "STEPS")

    one, two, old = (str(tmp_path / name) for name in ("one", "two", "old"))
    first = run(1, "step", "save", one, "save-old", old, "step")
    second = run(2, "step", "save", two, "load", one, "step")
    (tmp_path / "meet-1").unlink(missing_ok=True)
    third = run(1, "load", two, "step", "load", old, "step")
    for stage, steps in ((1, first), (2, second), (1, third)):
        assert len(steps) == 2
        for step in steps:
            assert step["clip_grad"] == (0.0 if stage == 1 else 0.01) and step["norm"] > 0.1
            assert step["clipped"] == pytest.approx(0.01, rel=0.01)
    assert [steps[1]["counts"] for steps in (first, second, third)] == [[2]] * 3 and third[0]["counts"] == [2]
    # One rank at stage 1 and 2 does the same; each second step goes on from the first.
    assert second[1]["norm"] == pytest.approx(first[1]["norm"], rel=0.01) and third[1]["norm"] == pytest.approx(first[1]["norm"], rel=0.01)


def test_zero_benchmark_stops_where_its_baseline_fails(monkeypatch):
    path = Path(__file__).parents[2] / "benchmarks/bench_zero_gpu.py"
    spec = importlib.util.spec_from_file_location("bench_zero_gpu", path)
    benchmark = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, benchmark)
    spec.loader.exec_module(benchmark)
    began, closed = [], []

    class Run:
        def __init__(self, name, tasks):
            self.name = name

        def hear(self):
            return []

        def outcome(self):
            began.append(self.name)
            raise RuntimeError(f"{self.name}: rank 0 ended")

        def close(self):
            closed.append(self.name)

    monkeypatch.setattr(benchmark, "Run", Run)
    monkeypatch.setattr(benchmark, "write_model", lambda directory, name: directory)
    with pytest.raises(RuntimeError, match=r"^1 rank: rank 0 ended$"):
        benchmark.compare([1], tiny=True)
    assert began == ["1 rank"] and set(closed) == {"1 rank", "1 rank, reordered", "2 ranks, ZeRO 1"}


@pytest.mark.parametrize("layout", ["official", "transformers"])
def test_a_checkpoint_in_any_layout_starts_with_the_same_losses(model_dir, tmp_path, one_rank, layout):
    exported = tmp_path / layout
    weights.save(weights.load(model_dir), exported, layout=layout, precision="fp32", companions=model_dir)
    assert not (exported / "model.safetensors").samefile(model_dir / "model.safetensors")
    assert curve(exported, tmp_path, ranks=1, stage=0) == one_rank
