"""FP8 blocks: against the types of ml_dtypes and torch, on odd shapes, with scales given, and what is refused."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.quant.fp8 import ACTIVATION_BLOCK, ACTIVATION_FLOOR, dequantize_fp8, quantize_fp8
from model.quant.grid import scale_bytes

BLOCKS = [(128, 128), (1, 128), (3, 5)]
shapes = st.lists(st.integers(1, 3), max_size=2).flatmap(
    lambda lead: st.tuples(*map(st.just, lead), st.integers(1, 140), st.integers(1, 140))
)


def drawn(shape: tuple[int, ...], seed: int, spread: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * 2.0 ** torch.randint(-spread, spread + 1, shape, generator=generator)


def by_the_book(x: torch.Tensor, block: tuple[int, int], floor: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """One block after the other, rounded by ml_dtypes; the scale's own rule is tested in test_grid."""
    rows, columns = block
    values = np.zeros(x.shape, dtype=ml_dtypes.float8_e4m3fn)
    scales = np.zeros((-(-x.shape[0] // rows), -(-x.shape[1] // columns)), dtype=np.uint8)
    for i, j in np.ndindex(*scales.shape):
        part = np.s_[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
        numbers = x.numpy()[part].astype(np.float32)
        scales[i, j] = int(scale_bytes(torch.tensor(float(np.abs(numbers).max())), 448.0, floor=floor))
        values[part] = (numbers.astype(np.float64) / 2.0 ** (int(scales[i, j]) - 127)).astype(np.float32).astype(ml_dtypes.float8_e4m3fn)
    return values.view(np.uint8), scales


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@settings(deadline=None)
@given(rows=st.integers(1, 140), columns=st.integers(1, 140), seed=st.integers(0, 999), spread=st.integers(0, 30))
def test_bytes_are_those_of_the_oracle(block: tuple[int, int], rows: int, columns: int, seed: int, spread: int) -> None:
    x = drawn((rows, columns), seed, spread)
    values, scales = quantize_fp8(x, block)
    expected_values, expected_scales = by_the_book(x, block)
    assert (values.dtype, scales.dtype) == (torch.float8_e4m3fn, torch.float8_e8m0fnu)
    np.testing.assert_array_equal(values.view(torch.uint8).numpy(), expected_values)
    np.testing.assert_array_equal(scales.view(torch.uint8).numpy(), expected_scales)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@settings(deadline=None)
@given(shape=shapes, seed=st.integers(0, 999))
def test_a_stack_is_quantised_matrix_by_matrix(block: tuple[int, int], shape: tuple[int, ...], seed: int) -> None:
    x = drawn(shape, seed)
    values, scales = quantize_fp8(x, block)
    back = dequantize_fp8(values, scales, block=block)
    flat = x.reshape(-1, *shape[-2:])
    for matrix, value, scale, restored in zip(
        flat, values.view(flat.shape), scales.view(len(flat), *scales.shape[-2:]), back.view(flat.shape)
    ):
        alone = quantize_fp8(matrix, block)
        assert torch.equal(value.view(torch.uint8), alone[0].view(torch.uint8))
        assert torch.equal(scale.view(torch.uint8), alone[1].view(torch.uint8))
        assert torch.equal(restored, dequantize_fp8(*alone, block=block))


@settings(deadline=None)
@given(seed=st.integers(0, 999), rows=st.integers(1, 200), columns=st.integers(1, 200), byte=st.integers(30, 200))
def test_every_code_comes_back(seed: int, rows: int, columns: int, byte: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (rows, columns), generator=generator).to(torch.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0x80
    values, scales = codes.view(torch.float8_e4m3fn), torch.full((-(-rows // 128), -(-columns // 128)), byte, dtype=torch.uint8)
    wide = dequantize_fp8(values, scales.view(torch.float8_e8m0fnu))
    expected = codes.numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float64) * 2.0 ** (byte - 127)
    np.testing.assert_array_equal(wide.numpy(), expected)
    np.testing.assert_array_equal(np.signbit(wide.numpy()), np.signbit(expected))
    again, same = quantize_fp8(wide, scales=scales.view(torch.float8_e8m0fnu))
    assert torch.equal(again.view(torch.uint8), codes) and torch.equal(same.view(torch.uint8), scales)
    assert torch.equal(dequantize_fp8(*quantize_fp8(wide)), wide)
    narrow = dequantize_fp8(values, scales.view(torch.float8_e8m0fnu), dtype=torch.bfloat16)
    assert torch.equal(narrow.float(), wide)


@settings(deadline=None)
@given(seed=st.integers(0, 999), spread=st.integers(0, 20))
def test_quantising_again_changes_no_value(seed: int, spread: int) -> None:
    once = dequantize_fp8(*quantize_fp8(drawn((130, 140), seed, spread)))
    assert torch.equal(dequantize_fp8(*quantize_fp8(once)), once)


def test_the_byte_of_224_alone_may_become_448_of_half_the_scale() -> None:
    first = quantize_fp8(torch.tensor([[225.0, 1.0]]), (1, 128))
    again = quantize_fp8(dequantize_fp8(*first, block=(1, 128)), (1, 128))
    assert [p[0].float().tolist() for p in (*first, *again)] == [[224.0, 1.0], [1.0], [448.0, 2.0], [0.5]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_source_may_have_any_float_type(dtype: torch.dtype) -> None:
    x = drawn((40, 150), 3).to(dtype)
    for got, expected in zip(quantize_fp8(x), quantize_fp8(x.float())):
        assert torch.equal(got.view(torch.uint8), expected.view(torch.uint8))


def test_strided_sources_and_vectors_and_nothing() -> None:
    x = drawn((150, 300), 4)
    for view in (x.T, x[:, 3:290], x[::2]):
        for got, expected in zip(quantize_fp8(view), quantize_fp8(view.clone(memory_format=torch.contiguous_format))):
            assert torch.equal(got.view(torch.uint8), expected.view(torch.uint8))
    values, scales = quantize_fp8(x[0], ACTIVATION_BLOCK)
    assert scales.shape == (3,)
    assert torch.equal(
        dequantize_fp8(values, scales, block=ACTIVATION_BLOCK), dequantize_fp8(*quantize_fp8(x[:1], ACTIVATION_BLOCK), block=(1, 128))[0]
    )
    empty = quantize_fp8(torch.empty(0, 5))
    assert empty[0].shape == (0, 5) and empty[1].shape == (0, 1) and dequantize_fp8(*empty).shape == (0, 5)


def test_zeros_stay_zeros_with_their_sign() -> None:
    values, scales = quantize_fp8(torch.tensor([[0.0, -0.0]]))
    assert values.view(torch.uint8).tolist() == [[0, 0x80]] and scales.float().item() == 2.0**-126
    assert dequantize_fp8(values, scales).signbit().tolist() == [[False, True]]


def test_the_floor_of_activations() -> None:
    tiny = torch.tensor([[1e-6, -1e-9]])
    _, scales = quantize_fp8(tiny, ACTIVATION_BLOCK, floor=ACTIVATION_FLOOR)
    assert scales.float().item() == 2.0 ** math.ceil(math.log2(1e-4 / 448))


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_numbers_that_are_not_finite_are_refused(bad: float) -> None:
    x = torch.zeros(300, 300)
    x[130, 270] = bad
    with pytest.raises(ValueError, match=r"1 of 9 blocks hold numbers that are not finite.*\[1, 2\]"):
        quantize_fp8(x)


def test_numbers_too_large_for_the_scales_given_are_refused() -> None:
    one = torch.ones(1, 1).to(torch.float8_e8m0fnu)
    assert quantize_fp8(torch.tensor([[448.0]]), scales=one)[0].float().item() == 448.0
    with pytest.raises(ValueError, match="exceed the scales given"):
        quantize_fp8(torch.tensor([[449.0]]), scales=one)


def test_contradicting_shapes_are_refused() -> None:
    values, scales = quantize_fp8(torch.ones(130, 130))
    with pytest.raises(ValueError, match=r"got scales of shape \(2, 2\), expected \(130, 2\)"):
        dequantize_fp8(values, scales, block=(1, 128))
    with pytest.raises(ValueError, match=r"got scales of shape \(1,\), expected \(1, 1\)"):
        quantize_fp8(torch.ones(2, 2), scales=scales[0, :1])
    with pytest.raises(ValueError, match=r"got scales of type torch\.uint8, expected torch\.float8_e8m0fnu"):
        dequantize_fp8(values, scales.view(torch.uint8))
    for x, block in ((torch.ones(5), (128, 128)), (torch.ones(5, 0), (1, 128)), (torch.ones(()), (1, 128))):
        with pytest.raises(ValueError, match="expected"):
            quantize_fp8(x, block)


def test_a_nan_scale_or_code_stays_visible() -> None:
    values, scales = quantize_fp8(torch.ones(2, 256), ACTIVATION_BLOCK)
    scales.view(torch.uint8)[0, 1] = 255
    values.view(torch.uint8)[1, 7] = 0x7F
    nan = dequantize_fp8(values, scales, block=ACTIVATION_BLOCK).isnan()
    assert nan[0, 128:].all() and nan[1, 7] and nan.sum() == 129


def test_quantising_tracks_no_gradient() -> None:
    values, scales = quantize_fp8(torch.randn(4, 4, requires_grad=True))
    assert not values.requires_grad and not scales.requires_grad
