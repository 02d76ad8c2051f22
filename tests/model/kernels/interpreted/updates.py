"""The optimizer's element-wise steps against plain torch."""

import pytest
import torch

from model.kernels.choice import choose
from model.kernels.updates import op, reference
from model.kernels.updates.reference import AdamStep
from runtime.config import OptimizerConfig
from runtime.optim import HybridOptimizer

SIZES = [1, 2048, 5003]
"""Less than a program's numbers, as many, and a ragged end."""


@pytest.fixture(autouse=True)
def triton_for_few_numbers(monkeypatch):
    """Run the kernels whatever the size."""
    choose("triton")
    monkeypatch.setattr(op, "FEW", 0)


def drawn(count, number):
    torch.manual_seed(count)
    tensors = [torch.randn(count + 3) for _ in range(number)]
    return [each[:count] for each in tensors], [each.clone()[:count] for each in tensors], [each[count:].clone() for each in tensors]


def check(got, want, ends):
    for mine, right, end in zip(got, want, ends, strict=True):
        torch.testing.assert_close(mine, right, rtol=2e-6, atol=1e-6)
        assert torch.equal(mine.as_strided((3,), (1,), len(mine)), end)  # behind the tensor


@pytest.mark.parametrize("count", SIZES, ids=str)
def test_nesterov(count):
    got, want, ends = drawn(count, 2)
    op.nesterov_(*got, 0.95)
    reference.nesterov_(*want, 0.95)
    check(got, want, ends)


@pytest.mark.parametrize("count", SIZES, ids=str)
def test_descend(count):
    got, want, ends = drawn(count, 2)
    op.descend_(*got, 0.01, 0.9)
    reference.descend_(*want, 0.01, 0.9)
    check(got, want, ends)


@pytest.mark.parametrize("count", SIZES, ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e-19, 1e-30], ids=str)
def test_adamw(count, scale):
    got, want, ends = drawn(count, 4)
    for parameter, gradient, mean, square in (got, want):
        gradient *= scale
        mean *= scale
        square.square_().mul_(scale).mul_(scale)
        ways = AdamStep((0.9, 0.95), 1e-20, 0.01, 0.999)
        (op if parameter is got[0] else reference).adamw_(parameter, gradient, (mean, square), ways)
    check(got, want, ends)


def test_no_gradient_moves_nothing_but_by_decay():
    parameter, nothing = torch.randn(100), torch.zeros(100)
    start = parameter.clone()
    op.adamw_(parameter, nothing, (nothing.clone(), nothing.clone()), AdamStep((0.9, 0.95), 1e-20, 0.01, 0.5))
    assert torch.equal(parameter, start * 0.5)


def test_steps_of_the_whole_optimizer():
    torch.manual_seed(0)
    shapes = {"a": (20, 30), "experts": (3, 30, 20), "norm": (50,), "embed.weight": (40, 20)}
    starts = {name: torch.randn(shape) for name, shape in shapes.items()}
    gradients = [{name: torch.randn(shape) for name, shape in shapes.items()} for _ in range(3)]
    ends = []
    for implementation in ("triton", "reference"):
        choose(implementation)
        parameters = {name: torch.nn.Parameter(start.clone()) for name, start in starts.items()}
        optimizer = HybridOptimizer(parameters.items(), OptimizerConfig(lr=0.01))
        for step in gradients:
            for name, parameter in parameters.items():
                parameter.grad = step[name].clone()
            optimizer.step()
        ends.append(parameters)
    for name, start in starts.items():
        moved, wanted = (each[name].detach() - start for each in ends)
        assert float((moved - wanted).norm() / wanted.norm()) < 5e-3
