"""The hyper-connections' Triton kernels against their definition, in value and gradient."""

from dataclasses import replace

import pytest
import torch

from model.config import ModelConfig
from model.hyper_connections import copies
from model.kernels.choice import choose
from model.kernels.hyper_connections import fused, op, reference

CONFIG = replace(ModelConfig(num_hidden_layers=1, compress_ratios=[0], num_nextn_predict_layers=0), hc_sinkhorn_iters=4)


@pytest.fixture(autouse=True)
def triton_and_nan_filled():
    """Run the kernels, on memory filled with NaN, so that an element that no kernel writes is seen."""
    choose("triton")
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    choose(None)


def inputs(tokens, width, dtype):
    torch.manual_seed(tokens)
    wide = [torch.randn(tokens, 4, width), torch.randn(24, 4 * width) * 0.3, torch.randn(24), torch.tensor([1.0, 0.7, -1.3])]
    factor = torch.randn(tokens, width)
    return [t.to(dtype).requires_grad_() for t in wide[:1]] + [t.requires_grad_() for t in wide[1:]] + [factor.to(dtype).requires_grad_()]


def layer(kernels, streams, fn, base, scale, factor):
    x, post, comb = kernels.mix_in(streams, fn, base, scale, config=CONFIG)
    return kernels.mix_out(x * factor, streams, post, comb)


def relative(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm())


@pytest.mark.parametrize(("tokens", "width"), [(1, 16), (5, 24), (70, 130)], ids=str)
def test_single_precision(tokens, width):
    mine = inputs(tokens, width, torch.float32)
    theirs = [t.detach().double().requires_grad_() for t in mine]
    grad = torch.randn(tokens, 4, width)
    out, want = layer(op, *mine), layer(reference, *theirs)
    assert relative(out.detach(), want.detach()) < 1e-5
    for got, expected in zip(torch.autograd.grad(out, mine, grad), torch.autograd.grad(want, theirs, grad.double()), strict=True):
        assert relative(got, expected) < 2e-5


def test_many_groups_and_slices(monkeypatch):
    monkeypatch.setattr(fused, "GROUP", 64)
    test_single_precision(130, 40)


def test_half_precision_streams_lose_no_more_than_their_rounding():
    mine = inputs(37, 48, torch.float16)  # the interpreter has no products of bf16; the kernels treat both alike
    theirs = [t.detach().double().requires_grad_() for t in mine]
    grad = torch.randn(37, 4, 48).half()
    out, want = layer(op, *mine), layer(reference, *theirs)
    wants = (want, *torch.autograd.grad(want, theirs, grad.double()))
    for got, expected in zip((out, *torch.autograd.grad(out, mine, grad)), wants, strict=True):
        assert relative(got.detach(), expected.detach()) < 2 * float(torch.finfo(torch.float16).eps)


def test_the_streams_handed_through_bring_their_gradient():
    mine = inputs(6, 24, torch.float32)
    x, post, comb, streams = op.mix_in_through(*mine[:4], config=CONFIG)
    out = op.mix_out(x * mine[4], streams, post, comb)
    grad = torch.randn(6, 4, 24)
    got = torch.autograd.grad(out, mine, grad)
    want = torch.autograd.grad(layer(op, *mine), mine, grad)
    assert all(relative(a, b) < 1e-6 for a, b in zip(got, want, strict=True))


def test_another_number_of_streams_is_refused():
    with pytest.raises(ValueError, match="3 streams, expected 4"):
        op.mix_in(torch.zeros(2, 3, 8), torch.zeros(15, 24), torch.zeros(15), torch.zeros(3), config=CONFIG)


@pytest.mark.parametrize(("tokens", "width", "count"), [(1, 16, 4), (7, 2100, 4), (5, 24, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_copies(tokens, width, count, dtype):
    wide = torch.randn(tokens, 2 * width, dtype=dtype, requires_grad=True)
    out = copies(wide[:, :width], count)  # rows may lie apart
    assert torch.equal(out, wide[:, None, :width].expand(-1, count, -1))
    grad = torch.randn(tokens, width, count, dtype=dtype).transpose(1, 2)
    (got,) = torch.autograd.grad(out, wide, grad)
    want = torch.nn.functional.pad(grad.float().sum(1), (0, width))
    torch.testing.assert_close(
        got, want.to(dtype), atol=1e-6 if dtype == torch.float32 else 1e-3, rtol=1e-6 if dtype == torch.float32 else 1e-3
    )
