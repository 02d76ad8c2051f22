"""The routed experts with Triton between the grouped products, against the dense definition, in value and gradient."""

import pytest
import torch

from model.kernels.experts import fused, gated, reference
from model.kernels.static_decode import fused_experts


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Give rows several tiles."""
    monkeypatch.setattr(fused, "COPY", {"BLOCK": 8, "num_warps": 1})
    monkeypatch.setattr(fused, "BACKWARD", {"ROWS": 4, "BLOCK": 8, "num_warps": 1})


@pytest.mark.parametrize(("tokens", "experts", "active"), [(1, 3, 2), (37, 6, 2), (20, 4, 1), (100, 4, 3)], ids=str)
def test_routed_experts(tokens, experts, active):
    torch.manual_seed(1)
    x = torch.randn(tokens, 16, requires_grad=True)
    matrices = tuple(torch.randn(shape, requires_grad=True) for shape in ((experts, 24, 16), (experts, 16, 24), (experts, 24, 16)))
    indices = torch.rand(tokens, experts - 1).topk(active).indices  # the last expert gets nothing
    weights = torch.rand(tokens, active, requires_grad=True)
    grad, beside = torch.randn(tokens, 16), torch.randn(tokens, 16, requires_grad=True)
    results = []
    for run in (
        lambda x, i, w, b, *m: fused.RoutedExperts.apply(x, i, w, *m, 2.0, b),
        lambda x, i, w, b, *m: reference.routed_experts(x, i, w, m, limit=2.0) + b,
    ):
        out = run(x, indices, weights, beside, *matrices)
        results.append((out, *torch.autograd.grad(out, (x, weights, beside, *matrices), grad)))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("branch", [0, 1], ids=["gate", "up"])
def test_nan_stays_nan_both_ways(branch):
    """A limit would make it a number like any other, and a broken step would go unseen."""
    x, (shares, indices) = torch.ones(2, 16), (torch.ones(2, 1), torch.tensor([[0], [1]]))
    matrices = [torch.ones(2, 8, 16), torch.ones(2, 16, 8), torch.ones(2, 8, 16)]
    matrices[2 * branch][1] = float("nan")
    for tensor in (x, *matrices):
        tensor.requires_grad_()
    routed = fused.RoutedExperts.apply(x, indices, shares, *matrices, 2.0)
    both = torch.ones(2, 16)
    both[1, 8 * branch] = float("nan")
    gates = gated.swiglu(both.requires_grad_(), 2.0)
    few = fused_experts.experts(x, indices, shares, tuple(matrices), limit=2.0)
    for rows in (routed, few, *torch.autograd.grad(routed.sum(), x), gates, *torch.autograd.grad(gates.sum(), both)):
        assert rows.isnan().any(1).tolist() == [False, True]


@pytest.mark.parametrize(("tokens", "width"), [(1, 24), (37, 192), (0, 64)], ids=str)
def test_swiglu(tokens, width, monkeypatch):
    monkeypatch.setattr(gated, "TILE", 128)
    torch.manual_seed(2)
    both, grad = torch.randn(tokens, 2 * width, requires_grad=True), torch.randn(tokens, width)
    gate, up = both.double().chunk(2, 1)
    want = torch.nn.functional.silu(gate.clamp(max=1.0)) * up.clamp(-1.0, 1.0)
    got = gated.swiglu(both, 1.0)
    torch.testing.assert_close(got, want.float())
    torch.testing.assert_close(torch.autograd.grad(got, both, grad), torch.autograd.grad(want, both, grad.double()))
