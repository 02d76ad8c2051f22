"""One and two ranks, at every ZeRO stage, follow one loss curve with Muon stepping under DeepSpeed."""

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


def sum_of_losses(printed: list[str]) -> list[float]:
    parts = [json.loads(out.split("LOSSES ")[1]) for out in printed]
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
    answers = [json.loads(out.split("ANSWERS ")[1].splitlines()[0]) for out in (*alone, *both)]
    assert answers[0] == answers[1] == answers[2] and all(answers[0])
    assert sum_of_losses(both) == pytest.approx(sum_of_losses(alone), abs=0.03)  # bf16


@pytest.mark.parametrize(("ranks", "stage"), [(1, 0), (2, 1), (2, 2)], ids=str)
def test_gradients_that_are_not_finite_change_nothing(model_dir, tmp_path, ranks, stage):
    printed = outputs(model_dir, tmp_path, "spoil", ranks=ranks, stage=stage)
    assert [json.loads(out.split("SKIPPED ")[1].splitlines()[0]) for out in printed] == [[[2, True]]] * ranks
    assert all(math.isfinite(loss) for loss in sum_of_losses(printed))


@pytest.mark.parametrize("layout", ["official", "transformers"])
def test_a_checkpoint_in_any_layout_starts_with_the_same_losses(model_dir, tmp_path, one_rank, layout):
    exported = tmp_path / layout
    weights.save(weights.load(model_dir), exported, layout=layout, precision="fp32", companions=model_dir)
    assert not (exported / "model.safetensors").samefile(model_dir / "model.safetensors")
    assert curve(exported, tmp_path, ranks=1, stage=0) == one_rank
