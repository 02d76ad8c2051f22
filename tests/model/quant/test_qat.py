"""Training on the grids: forward equals the stored form, the gradient is the identity."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.quant.fp8 import dequantize_fp8, quantize_fp8
from model.quant.hadamard import hadamard
from model.quant.mxfp4 import dequantize_mxfp4, mxfp4_to_fp8, quantize_mxfp4
from model.quant.qat import fake_quantize_fp8, fake_quantize_index, fake_quantize_kv, fake_quantize_mxfp4, straight_through


@settings(deadline=None)
@given(shape=st.sampled_from([(2,), (5, 34), (3, 16, 64), (2, 40, 100)]), seed=st.integers(0, 999), spread=st.integers(0, 8))
def test_experts_see_what_the_checkpoint_will_hold(shape: tuple[int, ...], seed: int, spread: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=generator) * 2.0 ** torch.randint(-spread, spread + 1, shape, generator=generator)
    seen = fake_quantize_mxfp4(w)
    assert torch.equal(seen, dequantize_mxfp4(*quantize_mxfp4(w), dtype=torch.float32))
    assert torch.equal(fake_quantize_mxfp4(w, dtype=torch.bfloat16).float(), seen)
    assert torch.equal(fake_quantize_mxfp4(seen), seen)


@pytest.mark.parametrize("block", [(128, 128), (1, 128)], ids=str)
def test_linears_see_what_the_checkpoint_will_hold(block: tuple[int, int]) -> None:
    w = torch.randn(200, 300)
    assert torch.equal(fake_quantize_fp8(w, block), dequantize_fp8(*quantize_fp8(w, block), block=block))


def test_the_way_through_fp8_changes_nothing() -> None:
    w = torch.randn(2, 256, 256)
    through = dequantize_fp8(*mxfp4_to_fp8(*quantize_mxfp4(w)))
    assert torch.equal(fake_quantize_mxfp4(w), through)


def test_a_number_alone() -> None:
    for x in (0.0, 1.0, -3.7, 1e-30, 5e20):
        seen = fake_quantize_mxfp4(torch.tensor([x])).item()
        assert seen == pytest.approx(x, rel=1 / 8) and math.copysign(1, seen) == math.copysign(1, x)


@pytest.mark.parametrize(
    "quantize",
    [
        fake_quantize_mxfp4,
        fake_quantize_fp8,
        lambda x: fake_quantize_kv(x, rope_dims=8),
        lambda x: fake_quantize_mxfp4(x, dtype=torch.bfloat16),
    ],
    ids=["mxfp4", "fp8", "kv", "mxfp4-bf16"],
)
def test_the_gradient_is_the_identity(quantize) -> None:
    master = torch.randn(3, 6, 40, requires_grad=True)
    seen = quantize(master)
    grad = torch.randn(3, 6, 40).to(seen.dtype)
    seen.backward(grad)
    assert master.grad is not None and master.grad.dtype == torch.float32
    assert torch.equal(master.grad, grad.float())


def test_the_index_path_rotates_and_rounds_as_its_cache_does() -> None:
    x = torch.randn(10, 4, 128, requires_grad=True)
    seen = fake_quantize_index(x)
    packed, scales = quantize_mxfp4(hadamard(x))
    assert packed.shape[-1] + scales.shape[-1] == 68
    assert torch.equal(seen, dequantize_mxfp4(packed, scales, dtype=torch.float32))
    grad = torch.randn_like(seen)
    seen.backward(grad)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, hadamard(grad))


def test_rotation_lessens_the_error_of_index_products_with_outliers() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 500, 128, generator=generator)
    q[:, 3] *= 30
    k[:, 3] *= 30
    exact = q @ k.T

    def error(a, b):  # type: ignore[no-untyped-def]
        return ((a @ b.T - exact).norm() / exact.norm()).item()

    assert error(fake_quantize_index(q), fake_quantize_index(k)) < 0.15
    assert fake_quantize_index(torch.randn(2, 16)).shape == (2, 16)


def test_training_reaches_a_grid_point_that_rounding_alone_does_not() -> None:
    """The master moves although single steps are far smaller than a step of the grid."""
    master = torch.full((1, 32), 1.0, requires_grad=True)
    with torch.no_grad():
        master[0, 0] = 6.0
    for _ in range(100):
        (grad,) = torch.autograd.grad((fake_quantize_mxfp4(master) - 1.5)[0, 1:].square().sum(), master)
        with torch.no_grad():
            master -= 0.01 * grad
    assert (fake_quantize_mxfp4(master)[0, 1:] == 1.5).all()


def test_bad_numbers_are_nan_and_nothing_raises() -> None:
    w = torch.ones(2, 64)
    w[0, 3] = math.inf
    assert fake_quantize_mxfp4(w).isnan().sum() == 32 and fake_quantize_fp8(w).isnan().sum() == 64


def test_what_is_returned_is_the_rounded_number_itself() -> None:
    x = torch.tensor([1e8], requires_grad=True)
    rounded = torch.tensor([1.0])
    assert straight_through(x, rounded).item() == 1.0
