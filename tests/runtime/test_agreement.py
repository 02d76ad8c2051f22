"""Rollout and trainer compute one model; a checkpoint restores training bit for bit; sampling depends on seed and weights alone."""

import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch

from domains.catalog import make_domain
from domains.config import DomainConfig, SandboxConfig
from rl.advantages import group_advantages
from runtime.batch import PackedSample, pack
from runtime.config import OptimizerConfig, SamplingConfig
from runtime.engine import Engine
from runtime.evaluate import evaluate, wilson
from runtime.rollout import Rollout
from runtime.spec import EngineSpec, LossSpec
from runtime.step import DomainSetup
from runtime.trainer import LocalGroup, Trainer

SAMPLING = SamplingConfig(max_new_tokens=12)


@pytest.fixture(scope="module")
def parts(request, tmp_path_factory):
    """One engine with a math domain, and both handles on it; a process can only ever have one."""

    model_dir = request.getfixturevalue(os.environ.get("AGREEMENT_MODEL", "model_dir"))
    setup = DomainSetup(name="math", domain=DomainConfig(kind="math"), sampling=SAMPLING)
    place = tmp_path_factory.mktemp("engine")
    zero = {"zero_optimization": {"stage": 1}}
    spec = EngineSpec(
        model=str(model_dir),
        optimizer=OptimizerConfig(lr=0.01),
        deepspeed=zero,
        frozen={"reference": str(model_dir)},
        domains={"math": setup},
        rendezvous=f"file://{place}/rendezvous",
    )
    group = LocalGroup(Engine(spec))
    domain = make_domain("math", setup.domain, SandboxConfig())
    yield Trainer(group, workdir=place), Rollout(group), domain
    domain.close()
    group.close()


def rows_of(samples):
    packed = [PackedSample(s.tokens, s.sampled, {"logprobs": s.logprobs, "advantages": [0.5] * len(s.tokens)}) for s in samples]
    return pack(packed, row_tokens=512)


def test_rollout_and_trainer_agree_on_the_same_tokens(parts):
    trainer, rollout, domain = parts
    samples = rollout.generate(domain.prompts("train", 6, seed=0), SAMPLING, samples=4, stream="agreement")
    rows = rows_of(samples)
    for row, trained in zip(rows, trainer.logprobs(rows), strict=True):
        np.testing.assert_allclose(trained, row.fields["logprobs"][row.targets], atol=1e-4)
    spec = LossSpec("rl.loss:grpo", {"clip": (0.2, 0.28)})
    assert trainer.train_step(rows, spec, lr=0.0)["mismatch_kl/mean"] < 1e-7


def test_the_same_stream_gives_the_same_samples_whatever_shares_the_batch(parts):
    _, rollout, domain = parts
    prompts = domain.prompts("train", 5, seed=0)
    together = rollout.generate(prompts, SAMPLING, samples=2, stream="a")
    alone = rollout.generate(prompts[3:4], SAMPLING, samples=2, stream="a")
    assert [s.tokens for s in together[6:8]] == [s.tokens for s in alone]
    assert [s.tokens for s in rollout.generate(prompts, SAMPLING, samples=2, stream="b")] != [s.tokens for s in together]


def test_samples_hold_what_a_loss_needs(parts):
    _, rollout, domain = parts
    for sample in rollout.generate(domain.prompts("train", 4, seed=1), SAMPLING, stream="c", version=7):
        assert len(sample.tokens) == len(sample.sampled) == len(sample.logprobs)
        assert not sample.sampled[0] and 0 < sum(sample.sampled) <= 12 and sample.policy_version == 7
        assert all(logprob <= 0 for logprob in sample.logprobs)
        assert sample.truncated == (sum(sample.sampled) == 12 and sample.tokens[-1] != 1)


def test_a_checkpoint_restores_training_bit_for_bit(parts):
    trainer, rollout, domain = parts
    rows = rows_of(rollout.generate(domain.prompts("train", 4, seed=2), SAMPLING, samples=2, stream="d"))
    spec = LossSpec("experts.loss:cross_entropy", balance_weight=1e-3)

    def steps(count):
        return [trainer.train_step(rows, spec, lr=0.01, router_bias_speed=1e-3)["loss"] for _ in range(count)]

    steps(2)
    trainer.save(2, {"cursor": 5})
    first = steps(3)
    assert trainer.resume() == {"step": 2, "cursor": 5}
    assert steps(3) == first and first[2] < first[0]


def test_rows_that_cannot_be_written_to_train_without_a_warning(parts):
    trainer, rollout, domain = parts
    rows = rows_of(rollout.generate(domain.prompts("train", 4, seed=4), SAMPLING, samples=2, stream="g"))
    for row in rows:  # as Ray delivers them
        for array in (row.tokens, row.cu_seqlens, row.targets, *row.fields.values()):
            array.flags.writeable = False
    always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    with warnings.catch_warnings(action="error", category=UserWarning):
        trainer.train_step(rows, LossSpec("rl.loss:grpo", {"clip": (0.2, 0.28)}), lr=0.0)
        trainer.logprobs(rows)
    torch.set_warn_always(always)


def test_the_frozen_model_stays_where_it_started(parts):
    trainer, rollout, domain = parts
    rows = rows_of(rollout.generate(domain.prompts("train", 3, seed=3), SAMPLING, stream="e"))
    before = trainer.logprobs(rows, "reference")
    trainer.train_step(rows, LossSpec("experts.loss:cross_entropy"), lr=0.01)
    assert all((a == b).all() for a, b in zip(before, trainer.logprobs(rows, "reference"), strict=True))
    assert any((a != b).any() for a, b in zip(before, trainer.logprobs(rows), strict=True))


def test_evaluation_counts_graded_prompts(parts):
    _, rollout, domain = parts
    found = evaluate(rollout, domain, prompts=8, sampling=SAMPLING, seed=0)
    assert found["n"] == 8 == len(found["passed"]) and found["infrastructure"] == 0
    assert found["pass@1"] == sum(found["passed"]) / 8 and found["ci95"] == list(wilson(sum(found["passed"]), 8))


def test_advantages_of_real_verdicts_are_centred(parts):
    _, rollout, domain = parts
    verdicts = domain.grade(rollout.generate(domain.prompts("train", 2, seed=0), SAMPLING, samples=4, stream="f"))
    advantages = group_advantages(verdicts, samples_per_prompt=4)
    assert sum(a for a in advantages if a is not None) == pytest.approx(0)


@pytest.mark.skipif("AGREEMENT_MODEL" in os.environ, reason="is the inner run")
def test_all_of_this_holds_for_v32():
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=os.environ | {"AGREEMENT_MODEL": "v32_dir"}, check=False, capture_output=True, text=True)
    assert done.returncode == 0 and "8 passed" in done.stdout, done.stdout[-4000:]
