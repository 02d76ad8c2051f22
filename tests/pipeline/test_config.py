"""Every number a user may set has a range, and the shipped YAML composes."""

from dataclasses import fields, is_dataclass

import pytest

from model.config import ModelConfig
from pipeline import config as pipeline_config
from pipeline.config import CONF, UsageError, run_name


def numbers(node) -> set[str]:
    """Names of all number fields of a tree of dataclasses, the model's aside."""
    if isinstance(node, dict):
        return {name for value in node.values() for name in numbers(value)}
    if not is_dataclass(node) or isinstance(node, ModelConfig):
        return set()
    own = {f.name for f in fields(node) if type(getattr(node, f.name)) in (int, float)}
    return own.union(*(numbers(getattr(node, f.name)) for f in fields(node)))


def test_every_number_has_a_range(configure):
    ranged = pipeline_config._AT_LEAST.keys() | pipeline_config._ABOVE_ZERO | pipeline_config._SHARES
    assert numbers(configure()) == ranged


@pytest.mark.parametrize("path", sorted(CONF.glob("*/*.yaml")), ids=lambda path: f"{path.parent.name}={path.stem}")
def test_every_option_of_every_group_composes(configure, path):
    group = path.parent.name
    if group == "domain":
        config = configure(f"+domain@domains.extra={path.stem}")
        assert config.domains["extra"].domain.kind == path.stem
    else:
        configure(f"{'+' if group == 'stage' else ''}{group}={path.stem}")


def test_the_run_is_named_after_its_stage_unless_told_otherwise(configure):
    assert run_name(configure("+stage=experts")) == "experts"
    assert run_name(configure("run=mine")) == "mine"


def test_a_model_brings_its_budgets_and_a_gpu_its_engine(configure):
    tiny, small = configure(), configure("model=small", "cluster=one_gpu", "domains.code.grpo.steps=7")
    assert small.base.tokens_per_step > tiny.base.tokens_per_step
    assert small.engine.deepspeed["bf16"] == {"enabled": True} and "bf16" not in tiny.engine.deepspeed
    assert (small.domains["math"].grpo.prompts_per_step, small.domains["code"].grpo.steps) == (64, 7)
    assert configure("model=small", "cluster=one_gpu", "engine=zero2").engine.deepspeed["zero_optimization"]["stage"] == 2


@pytest.mark.parametrize(
    "override",
    [
        "domains.math.domain.kind=maths",
        "domains.math.grpo.samples_per_prompt=1",
        "domains.math.sampling.temperature=0",
        "domains.math.sampling.max_new_tokens=99999",
        "distill.prompts_per_step=2",
        "distill.init=scratch",
        "base.optimizer.name=sgd",
        "base.optimizer.betas=[0.9]",
        "run=../outside",
        "sandbox.backend=docker",
    ],
)
def test_a_contradiction_is_refused(configure, override):
    with pytest.raises(UsageError, match=r"got|unknown"):
        configure(override)
