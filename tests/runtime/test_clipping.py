"""Clipping at ZeRO 1: the norm of whole gradients, one wait a step, and nothing changed where a gradient is not finite."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch

from runtime import clipping
from runtime.clipping import Clipping, as_configured
from runtime.config import OptimizerConfig
from runtime.deepspeed_config import deepspeed_config
from runtime.spec import EngineSpec
from runtime.zero_layouts import ContiguousLayout

SHAPES = [torch.Size([3, 5]), torch.Size([7]), torch.Size([2, 2])]
OFFSETS = [0, 16, 24]
"""A gap of one behind each of the first two, and what is left of 32 behind the last: padding, which holds anything."""
LENGTH = 32


class Recorder(torch.optim.Optimizer):
    """Keeps the gradients that it steps on."""

    def __init__(self, groups):
        super().__init__([{"params": group} for group in groups], {})
        self.stepped = []

    def step(self, closure=None):
        self.stepped += [p.grad if p.grad is None else p.grad.clone() for group in self.param_groups for p in group["params"]]


class Zero:
    """What DeepSpeed's optimizer of stage 1 does around the one that it wraps, on one of some ranks."""

    def __init__(self, flats, layouts, most):
        self.flats, self.optimizer = flats, Recorder([[flat] for flat in flats])
        self.averaged_gradients = {}
        self.clipping = Clipping(self, layouts, most=most)

    def step(self, gradients, others, along):
        """Step on the first group's flat slice, and on other groups' gradients, which are kept one by one until their turn."""
        self.averaged_gradients = {0: None} | dict(enumerate(others, 1))
        groups = self.optimizer.param_groups
        self.clipping.begin(along)
        for i, flat in enumerate(self.flats):
            flat.grad = gradients.clone() if not i else torch.cat([g.flatten() for g in others[i - 1]]).float()
            self.averaged_gradients[i] = None
            self.optimizer.param_groups = [groups[i]]
            self.optimizer.step()
        self.optimizer.param_groups = groups
        return self.optimizer.stepped[-len(self.flats) :]


def make(monkeypatch, *, most, rank=0, ranks=1, reduced=()):
    """One rank's part; `reduced` are squares that the other ranks add."""

    def all_reduce(squares):
        squares += torch.tensor(reduced)

    fake = SimpleNamespace(get_world_size=lambda *_: ranks, get_rank=lambda *_: rank, all_reduce=all_reduce)
    monkeypatch.setattr(clipping, "dist", fake)
    flats = [torch.nn.Parameter(torch.zeros(LENGTH // ranks)), torch.nn.Parameter(torch.zeros(10))]
    return Zero(flats, {flats[0]: ContiguousLayout(SHAPES, OFFSETS, None)}, most)


def gradients():
    """The first group's buffer, not a number where it pads, and the other's gradients with padding of its own."""
    buffer = torch.full((LENGTH,), math.nan)
    for offset, shape in zip(OFFSETS, SHAPES, strict=True):
        buffer[offset : offset + shape.numel()] = torch.randn(shape.numel())
    padding = torch.full((4,), math.nan)
    padding._zero_padding = True
    return buffer, [torch.randn(2, 3), padding]


def norm_of(buffer, others):
    parts = [buffer[o : o + s.numel()] for o, s in zip(OFFSETS, SHAPES, strict=True)] + [others[0].flatten()]
    return torch.cat(parts).double().norm().item()


@pytest.mark.parametrize("most", [0.0, 0.5, 1e3])
def test_gradients_keep_their_direction_and_lose_what_their_norm_has_too_much(monkeypatch, most):
    torch.manual_seed(0)
    zero = make(monkeypatch, most=most)
    for _ in range(2):
        buffer, others = gradients()
        first, second = zero.step(buffer, [others], [torch.tensor(0.1), torch.tensor(3, dtype=torch.int64)])
        norm = norm_of(buffer, others)
        scale = min(1.0, most / norm) if most else 1.0
        assert zero.clipping.finite and zero.clipping.norm == pytest.approx(norm, rel=1e-6)
        assert zero.clipping.values == [torch.tensor(0.1).item(), 3.0]
        torch.testing.assert_close(first, buffer * scale, equal_nan=True)
        torch.testing.assert_close(second[:6], others[0].flatten() * scale)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_measures_its_own_slice_and_adds_the_others(monkeypatch, rank):
    torch.manual_seed(1)
    buffer, others = gradients()
    mine, theirs = buffer.chunk(2)[rank], buffer.chunk(2)[1 - rank]
    zero = make(
        monkeypatch, most=0.0, rank=rank, ranks=2, reduced=[theirs.nansum().new_tensor(float(theirs.nan_to_num().square().sum())), 0.0]
    )
    zero.step(mine, [others], [])
    assert zero.clipping.norm == pytest.approx(norm_of(buffer, others), rel=1e-5) and zero.clipping.values == []


@pytest.mark.parametrize("where", [0, 1])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_group_steps_where_any_gradient_is_not_finite(monkeypatch, where, value):
    zero = make(monkeypatch, most=1.0)
    buffer, others = gradients()
    (buffer[:15], others[0])[where].view(-1)[3] = value
    assert zero.step(buffer, [others], [torch.tensor(2.0)]) == [None, None]
    assert not zero.clipping.finite and zero.clipping.values == [2.0]
    buffer, others = gradients()
    assert all(each is not None for each in zero.step(buffer, [others], []))


def test_a_step_that_deepspeed_skips_is_no_step_of_ours(monkeypatch):
    zero = make(monkeypatch, most=1.0)
    buffer, others = gradients()
    zero.step(buffer, [others], [torch.tensor(2.0)])
    assert zero.clipping.end() == ([2.0], zero.clipping.norm) and zero.clipping.finite
    zero.clipping.begin([torch.tensor(3.0)])
    assert not zero.clipping.finite and zero.clipping.values == []
    with pytest.raises(AssertionError, match="never called"):
        zero.clipping.end()


def test_a_group_without_gradients_is_told(monkeypatch):
    zero = make(monkeypatch, most=1.0)
    buffer, _ = gradients()
    zero.averaged_gradients, zero.flats[0].grad = {0: None, 1: None}, buffer
    zero.clipping.begin([])
    zero.optimizer.param_groups = zero.optimizer.param_groups[:1]
    with pytest.raises(AssertionError, match="group 1 has no gradients"):
        zero.optimizer.step()


def test_loading_leaves_clipping_as_it_was_configured():
    loaded = SimpleNamespace(clip_grad=0.0, compute_grad_norm=False)
    with pytest.raises(OSError, match="unreadable"), as_configured(loaded):
        assert loaded.compute_grad_norm
        loaded.clip_grad = 1.0
        raise OSError("unreadable")
    assert loaded == SimpleNamespace(clip_grad=0.0, compute_grad_norm=False)
    plain = SimpleNamespace()
    with as_configured(plain):
        assert vars(plain) == {}
    assert vars(plain) == {}


BF16 = {"enabled": True}


@pytest.mark.parametrize(
    ("keys", "ours"),
    [
        ({"zero_optimization": {"stage": 1}, "bf16": BF16}, True),
        ({"zero_optimization": {"stage": 1}}, True),
        ({"zero_optimization": {"stage": 1}, "bf16": {"enabled": False, "check_grad_overflow": True}}, True),
        ({"zero_optimization": {"stage": 1}, "bf16": BF16 | {"check_grad_overflow": True}}, False),
        ({"zero_optimization": {"stage": 1}, "fp16": {"enabled": True}}, False),
        ({"zero_optimization": {"stage": 0}, "bf16": BF16}, False),
        ({"zero_optimization": {"stage": 2}, "bf16": BF16}, False),
        ({"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}, "bf16": BF16}, False),
    ],
)
def test_deepspeed_clips_where_we_do_not(keys, ours):
    before = copy.deepcopy(keys)
    config, most = deepspeed_config(EngineSpec(model="", optimizer=OptimizerConfig(grad_clip=0.7), deepspeed=keys))
    zero = keys["zero_optimization"]
    assert most == (0.7 if ours else None) and config["gradient_clipping"] == (0.0 if ours else 0.7)
    assert config["zero_optimization"] == zero | ({"compute_grad_norm": False} if ours else {})
    if keys.get("bf16") == BF16:
        assert config["bf16"] == {"enabled": True, "check_grad_overflow": zero["stage"] == 2}
    assert keys == before


@pytest.mark.parametrize("checked", [True, False])
@pytest.mark.parametrize("name", ["fp32", "float32"])
def test_gradients_wider_than_parameters_are_refused_at_zero_1(name, checked):
    keys = {"bf16": BF16 | {"check_grad_overflow": checked}, "data_types": {"grad_accum_dtype": name}}
    with pytest.raises(ValueError, match=f"data_types.grad_accum_dtype: got {name}"):
        deepspeed_config(EngineSpec(model="", optimizer=OptimizerConfig(), deepspeed=keys | {"zero_optimization": {"stage": 1}}))
    deepspeed_config(EngineSpec(model="", optimizer=OptimizerConfig(), deepspeed=keys | {"zero_optimization": {"stage": 2}}))
