"""The Hadamard transform against its matrix."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.quant.hadamard import hadamard


def matrix(width: int) -> torch.Tensor:
    """Entry (i, j) is (-1)^popcount(i & j) / sqrt(width)."""
    signs = [[(-1.0) ** (i & j).bit_count() for j in range(width)] for i in range(width)]
    return torch.tensor(signs, dtype=torch.float64) / width**0.5


@pytest.mark.parametrize("width", [1, 2, 4, 16, 32, 128, 512])
def test_it_multiplies_by_the_matrix(width: int) -> None:
    x = torch.randn(3, 5, width, generator=torch.Generator().manual_seed(width))
    torch.testing.assert_close(hadamard(x), (x.double() @ matrix(width)).float(), atol=2e-6, rtol=2e-6)


@settings(deadline=None)
@given(power=st.integers(0, 8), lead=st.sampled_from([(), (1,), (7,), (2, 3), (0,), (300,)]), seed=st.integers(0, 999))
def test_it_keeps_products_and_undoes_itself(power: int, lead: tuple[int, ...], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(2, *lead, 2**power, generator=generator)
    a, b = hadamard(x), hadamard(y)
    torch.testing.assert_close((a * b).sum(-1), (x * y).sum(-1), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(hadamard(a), x, atol=2e-6, rtol=2e-6)


def test_a_row_does_not_depend_on_its_batch() -> None:
    x = torch.randn(5000, 128)
    assert torch.equal(hadamard(x)[1234], hadamard(x[1234]))
    assert torch.equal(hadamard(x.T.contiguous().T), hadamard(x))


def test_it_is_computed_in_fp32_and_rounded_once() -> None:
    x = torch.randn(64, 128).bfloat16()
    assert torch.equal(hadamard(x), hadamard(x.float()).bfloat16())


def test_gradients() -> None:
    x = torch.randn(2, 8, requires_grad=True)
    grad = torch.randn(2, 8)
    (got,) = torch.autograd.grad(hadamard(x), x, grad)
    torch.testing.assert_close(got, (grad.double() @ matrix(8)).float())


@pytest.mark.parametrize("width", [0, 3, 96])
def test_other_widths_are_refused(width: int) -> None:
    with pytest.raises(ValueError, match=f"got a width of {width}, expected a power of two"):
        hadamard(torch.zeros(2, width))
