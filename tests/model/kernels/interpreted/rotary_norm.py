"""Normalisation and rotation with Triton against their definition, in value and gradient."""

import pytest
import torch

from model.kernels.rotary_norm import fused, reference


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Give rows several tiles and programs."""
    monkeypatch.setattr(fused, "TILE", 64)
    monkeypatch.setattr(fused, "PROGRAMS", 3)
    monkeypatch.setattr(fused, "FEW", 5)


def turns_of(*shape):
    return torch.polar(torch.ones(shape), torch.rand(shape) * 7)


def both(run, plain, leaves, grad):
    for out, want in ((run(*leaves), plain(*leaves)),):
        torch.testing.assert_close(out, want)
        given = [leaf for leaf in leaves if leaf is not None]
        for got, right in zip(torch.autograd.grad(out, given, grad), torch.autograd.grad(want, given, grad), strict=True):
            torch.testing.assert_close(got, right, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("pairs", [0, 3, 6], ids=str)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("shape", [(1, 12), (37, 12), (13, 3, 16), (5, 130)], ids=str)
def test_normalise(shape, weighted, pairs):
    torch.manual_seed(1)
    x = torch.randn(shape, requires_grad=True)
    weight = torch.randn(shape[-1], requires_grad=True) if weighted else None
    turns = turns_of(shape[0], *(1 for _ in shape[2:]), pairs) if pairs else None
    both(
        lambda x, w: fused.normalise(x, w, turns, 1e-3),
        lambda x, w: reference.normalise(x, w, turns, 1e-3),
        [x, weight],
        torch.randn(shape),
    )


@pytest.mark.parametrize("inverse", [False, True], ids=["forth", "back"])
@pytest.mark.parametrize("shape", [(7, 12), (13, 3, 16)], ids=str)
def test_rotate(shape, inverse):
    torch.manual_seed(2)
    turns = turns_of(shape[0], *(1 for _ in shape[2:]), 4)
    x = torch.randn(shape, requires_grad=True)
    both(lambda x: fused.rotate(x, turns, inverse=inverse), lambda x: reference.rotate(x, turns, inverse=inverse), [x], torch.randn(shape))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_normalise_into_another_dtype(dtype):
    torch.manual_seed(3)
    x, weight, grad = torch.randn(5, 12, requires_grad=True), torch.randn(12), torch.randn(5, 12).to(dtype)
    out, want = fused.normalise(x, weight, None, 1e-3, dtype), reference.normalise(x, weight, None, 1e-3)
    torch.testing.assert_close(out, want.to(dtype))
    got, right = torch.autograd.grad(out, x, grad)[0], torch.autograd.grad(want, x, grad.float())[0]
    torch.testing.assert_close(got, right, atol=1e-5, rtol=1e-4)


def test_rows_that_lie_apart_and_no_rows():
    wide = torch.randn(9, 40, requires_grad=True)
    turns, weight = turns_of(9, 2), torch.randn(12)
    both(
        lambda w: fused.normalise(w[:, 8:20], weight, turns, 1e-3),
        lambda w: reference.normalise(w[:, 8:20], weight, turns, 1e-3),
        [wide],
        torch.randn(9, 12),
    )
    none = torch.zeros(0, 12, requires_grad=True)
    out = fused.normalise(none, weight.requires_grad_(), turns[:0], 1e-3)
    assert out.shape == (0, 12)
    assert [float(grad.abs().sum()) for grad in torch.autograd.grad(out.sum(), (none, weight))] == [0, 0]
