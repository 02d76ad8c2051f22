"""Two GPUs, at every ZeRO stage, follow one GPU's loss curve in bf16, and sample from the weights they share."""

import importlib.util
import math
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [pytest.mark.gpus2, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")]
SPREAD = 4
"""Runs may part this many times as far as two runs on one GPU that differ by the order of a row's samples, that is by rounding."""


@pytest.fixture(scope="module")
def benchmark():
    path = Path(__file__).parents[2] / "benchmarks/bench_zero_gpu.py"
    spec = importlib.util.spec_from_file_location("bench_zero_gpu", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def outcomes(benchmark):
    return benchmark.compare([1, 3, 2], tiny=False)


def test_one_gpu_learns(outcomes):
    assert outcomes[0].losses[-1] < outcomes[0].losses[0] - 0.3


def test_every_stage_gives_the_same_curve(benchmark, outcomes):
    one, reordered, *two = outcomes
    assert len(two) == 3
    for outcome in two:
        # The first step's weights are the same bits, so only the order of the sum over rows may differ.
        assert outcome.losses[0] == pytest.approx(one.losses[0], rel=1e-5), outcome.name
        assert benchmark.distance(outcome, one) <= SPREAD * benchmark.distance(reordered, one), outcome.name


def test_every_stage_samples(outcomes):
    for outcome in outcomes:
        assert len(outcome.answers) == 4 and all(len(answer) > 1 for answer in outcome.answers), outcome.name
        assert all(math.isfinite(loss) for loss in outcome.losses)
