"""The router with Triton against its definition, in value and gradient."""

import pytest
import torch

from model.kernels.router import fused, reference
from model.kernels.router.rule import Rule


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Give tokens several tiles."""
    monkeypatch.setattr(fused, "TILE", 64)
    monkeypatch.setattr(fused, "PARTS", 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("hashed", [False, True], ids=["chosen", "hashed"])
@pytest.mark.parametrize(("scoring", "normalises"), [("sqrtsoftplus", True), ("sigmoid", True), ("sqrtsoftplus", False)], ids=str)
@pytest.mark.parametrize(("tokens", "experts", "active"), [(1, 5, 1), (37, 12, 3)], ids=str)
def test_route(tokens, experts, active, scoring, normalises, hashed, dtype):
    torch.manual_seed(1)
    rule = Rule(scoring, active, normalises, 1.5)
    x, weight = torch.randn(tokens, 24).to(dtype).requires_grad_(), torch.randn(experts, 24, requires_grad=True)
    bias, given = torch.randn(experts), torch.rand(tokens, experts).topk(active).indices
    routing = fused.route(x, weight, rule, **({"indices": given} if hashed else {"bias": bias}))
    scores = reference.scores(x, weight, rule)
    expected = given if hashed else (scores + bias).topk(active).indices
    assert torch.equal(routing.indices.sort(1).values, expected.sort(1).values)
    weights = reference.weigh(scores, routing.indices, rule)
    loose = {"atol": 1e-5, "rtol": 1e-4}
    torch.testing.assert_close(routing.scores, scores.float(), **loose)
    torch.testing.assert_close(routing.weights, weights.float(), **loose)
    assert torch.equal(routing.counts.sum(0), torch.bincount(expected.flatten(), minlength=experts).float())
    grads = torch.randn(tokens, active), torch.randn(tokens, experts)
    for some in (slice(0, 1), slice(0, 2)):
        got = torch.autograd.grad((routing.weights, routing.scores)[some], (x, weight), grads[some], retain_graph=True)
        want = torch.autograd.grad((weights, scores)[some], (x, weight), [g.double() for g in grads[some]], retain_graph=True)
        rounding = {"atol": 2e-2, "rtol": 2e-3} if dtype == torch.float16 else loose
        torch.testing.assert_close(got[0], want[0], **rounding)
        torch.testing.assert_close(got[1], want[1].float(), **loose)


def test_scores_of_very_unlikely_experts():
    x = torch.tensor([[-30.0], [-20.0], [-5.0], [0.0], [30.0]], requires_grad=True)
    rule = Rule("sqrtsoftplus", 1, False, 1.0)
    weight, want = torch.ones(1, 1, requires_grad=True), reference.scores(x, torch.ones(1, 1), rule)
    got = fused.route(x, weight, rule, bias=torch.zeros(1)).scores
    torch.testing.assert_close(got, want.float(), atol=0, rtol=1e-5)
    torch.testing.assert_close(torch.autograd.grad(got.sum(), x), torch.autograd.grad(want.sum(), x), atol=0, rtol=1e-5)


@pytest.mark.parametrize("lengths", [[1], [3, 70, 1, 40], [1] * 20], ids=str)
def test_balance_loss(lengths):
    torch.manual_seed(2)
    tokens, experts, active = sum(lengths), 12, 3
    cu, sample = torch.tensor([0, *lengths]).cumsum(0), torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    scores, indices = torch.rand(tokens, experts, requires_grad=True), torch.rand(tokens, experts).topk(active).indices
    got, want = fused.balance_loss(scores, indices, cu, sample), reference.balance_loss(scores, indices, cu)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, scores), torch.autograd.grad(want, scores), atol=1e-7, rtol=1e-4)
