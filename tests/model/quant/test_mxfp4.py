"""MXFP4: codes of ml_dtypes, packing, what is refused, and the step to FP8 within and beyond its range."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.quant.fp8 import dequantize_fp8
from model.quant.grid import scale_bytes
from model.quant.mxfp4 import dequantize_mxfp4, fits_fp8, mxfp4_to_fp8, quantize_mxfp4

VALUES = [0, 0.5, 1, 1.5, 2, 3, 4, 6]


def drawn(shape: tuple[int, ...], seed: int, spread: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * 2.0 ** torch.randint(-spread, spread + 1, shape, generator=generator)


def random_bytes(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed)).to(torch.uint8).view(torch.int8)


def scales_of(exponents: torch.Tensor) -> torch.Tensor:
    return (exponents + 127).to(torch.uint8).view(torch.float8_e8m0fnu)


@settings(deadline=None)
@given(rows=st.integers(1, 9), pairs=st.integers(1, 60), seed=st.integers(0, 9999), spread=st.integers(0, 6))
def test_codes_are_those_of_the_oracle(rows: int, pairs: int, seed: int, spread: int) -> None:
    x = drawn((rows, 2 * pairs), seed, spread)
    packed, scales = quantize_mxfp4(x)
    assert (packed.dtype, scales.dtype) == (torch.int8, torch.float8_e8m0fnu)
    assert packed.shape == (rows, pairs) and scales.shape == (rows, -(-pairs // 16))
    for column in range(0, 2 * pairs, 32):
        group = x[:, column : column + 32]
        byte = scale_bytes(group.abs().amax(1), 6.0)
        assert torch.equal(scales.view(torch.uint8)[:, column // 32], byte)
        codes = (group / 2.0 ** (byte[:, None].float() - 127)).numpy().astype(ml_dtypes.float4_e2m1fn).view(np.uint8) & 15
        nibbles = packed.view(torch.uint8)[:, column // 2 : column // 2 + 16].numpy()
        np.testing.assert_array_equal(nibbles & 15, codes[:, 0::2])
        np.testing.assert_array_equal(nibbles >> 4, codes[:, 1::2])


def test_all_bytes_unpack_low_nibble_first() -> None:
    packed = torch.arange(256, dtype=torch.uint8).view(16, 16)
    scales = scales_of(torch.arange(-8, 8).view(16, 1))
    signed = [float(v) for v in VALUES] + [-float(v) for v in VALUES]
    expected = [[signed[n] * 2.0 ** (row - 8) for b in range(16 * row, 16 * row + 16) for n in (b & 15, b >> 4)] for row in range(16)]
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        got = dequantize_mxfp4(packed.view(torch.int8), scales, dtype=dtype)
        assert got.dtype == dtype and got.tolist() == expected
        assert got.signbit().tolist() == [[math.copysign(1, v) < 0 for v in row] for row in expected]


@settings(deadline=None)
@given(shape=st.sampled_from([(2,), (3, 34), (2, 3, 64), (1, 1, 5, 100), (4, 0, 32)]), seed=st.integers(0, 999))
def test_bytes_come_back_with_their_scales_and_values_without(shape: tuple[int, ...], seed: int) -> None:
    packed = random_bytes((*shape[:-1], shape[-1] // 2), seed)
    scales = scales_of(torch.randint(-20, 20, (*shape[:-1], -(-shape[-1] // 32)), generator=torch.Generator().manual_seed(seed)))
    wide = dequantize_mxfp4(packed, scales, dtype=torch.float32)
    assert wide.shape == shape and torch.equal(dequantize_mxfp4(packed, scales).float(), wide)
    again, same = quantize_mxfp4(wide, scales=scales)
    assert torch.equal(again, packed) and torch.equal(same.view(torch.uint8), scales.view(torch.uint8))
    assert torch.equal(dequantize_mxfp4(*quantize_mxfp4(wide), dtype=torch.float32), wide)


def test_bytes_are_stable_from_the_second_time_on() -> None:
    first = dequantize_mxfp4(*quantize_mxfp4(drawn((64, 256), 5)))
    second = quantize_mxfp4(first)
    third = quantize_mxfp4(dequantize_mxfp4(*second))
    assert torch.equal(second[0], third[0]) and torch.equal(second[1].view(torch.uint8), third[1].view(torch.uint8))


@settings(deadline=None)
@given(seed=st.integers(0, 9999))
def test_the_error_is_at_most_half_a_step(seed: int) -> None:
    x = drawn((8, 64), seed, 4)
    back = dequantize_mxfp4(*quantize_mxfp4(x), dtype=torch.float32)
    amax = x.view(8, 2, 32).abs().amax(-1, keepdim=True).expand(8, 2, 32).reshape(8, 64)
    assert ((back - x).abs() <= torch.maximum(x.abs() / 4, amax / 12)).all()


def test_stacks_and_strides_are_quantised_row_by_row() -> None:
    x = drawn((3, 96, 70), 6)
    packed, scales = quantize_mxfp4(x.transpose(1, 2))
    for e in range(3):
        alone = quantize_mxfp4(x[e].T.contiguous())
        assert torch.equal(packed[e], alone[0]) and torch.equal(scales[e].view(torch.uint8), alone[1].view(torch.uint8))


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="got 5 columns, expected an even number"):
        quantize_mxfp4(torch.ones(2, 5))
    for bad in (math.inf, math.nan):
        with pytest.raises(ValueError, match=r"1 of 6 blocks hold numbers that are not finite.*\[1, 2\]"):
            quantize_mxfp4(torch.ones(2, 96).index_put((torch.tensor(1), torch.tensor(70)), torch.tensor(bad)))
    with pytest.raises(ValueError, match="exceed the scales given"):
        quantize_mxfp4(torch.full((1, 32), 6.5), scales=scales_of(torch.zeros(1, 1)))
    with pytest.raises(ValueError, match=r"got scales of shape \(2, 1\), expected \(2, 2\)"):
        dequantize_mxfp4(torch.zeros(2, 32, dtype=torch.int8), scales_of(torch.zeros(2, 1)))


def test_a_nan_scale_stays_visible() -> None:
    nan = dequantize_mxfp4(torch.zeros(1, 32, dtype=torch.int8), torch.tensor([[127, 255]], dtype=torch.uint8).view(torch.float8_e8m0fnu))
    assert nan.isnan().tolist() == [[False] * 32 + [True] * 32]


@pytest.mark.parametrize("block", [(128, 128), (1, 128), (128, 32), (7, 96)], ids=str)
@settings(deadline=None)
@given(
    shape=st.sampled_from([(1, 2), (128, 128), (130, 160), (2, 5, 70), (3, 128, 256)]), seed=st.integers(0, 99), base=st.integers(-80, 80)
)
def test_the_step_to_fp8_is_lossless_up_to_two_to_the_14(block: tuple[int, int], shape: tuple[int, ...], seed: int, base: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    packed = random_bytes((*shape[:-1], shape[-1] // 2), seed)
    scales = scales_of(base + torch.randint(0, 15, (*shape[:-1], -(-shape[-1] // 32)), generator=generator))
    assert fits_fp8(packed, scales, block=block).all()
    values, chosen = mxfp4_to_fp8(packed, scales, block=block)
    assert values.dtype == torch.float8_e4m3fn and chosen.dtype == torch.float8_e8m0fnu
    got, expected = dequantize_fp8(values, chosen, block=block), dequantize_mxfp4(packed, scales, dtype=torch.float32)
    assert torch.equal(got, expected) and torch.equal(got.signbit(), expected.signbit())


@pytest.mark.parametrize("code", range(1, 8))
@pytest.mark.parametrize("ratio", range(11, 21))
def test_the_edge_of_the_range(code: int, ratio: int) -> None:
    """A group of 6s beside a group of one code, 2^-ratio below: exact while the code times 2^(6 - ratio) is a multiple of 2^-9."""
    packed = torch.tensor([[0x77] * 16 + [code | code << 4 | 0x80] * 16], dtype=torch.uint8)
    scales = scales_of(torch.tensor([[0, -ratio]]))
    exact = (VALUES[code] * 2.0 ** (15 - ratio)).is_integer()
    assert exact or ratio > 14
    assert fits_fp8(packed, scales).item() == exact
    if exact:
        assert torch.equal(dequantize_fp8(*mxfp4_to_fp8(packed, scales)), dequantize_mxfp4(packed, scales, dtype=torch.float32))
    else:
        with pytest.raises(ValueError, match=r"1 of 1 blocks hold values that FP8 cannot hold exactly.*\[0, 0\]"):
            mxfp4_to_fp8(packed, scales)


def test_only_the_blocks_concerned_do_not_fit() -> None:
    packed, exponents = torch.full((256, 128), 0x11, dtype=torch.uint8), torch.zeros(256, 8)
    exponents[200, 1] = 15
    assert fits_fp8(packed, scales_of(exponents)).tolist() == [[True, True], [False, True]]


def test_groups_of_zeros_do_not_narrow_the_range() -> None:
    packed = torch.cat([torch.full((1, 16), 0x08, dtype=torch.uint8), torch.full((1, 16), 0x17, dtype=torch.uint8)], 1)
    for zero_scale in (-126, 100):
        scales = scales_of(torch.tensor([[zero_scale, 3]]))
        assert torch.equal(dequantize_fp8(*mxfp4_to_fp8(packed, scales)), dequantize_mxfp4(packed, scales, dtype=torch.float32))


@pytest.mark.parametrize("exponent", [-127, -126, -121, 120, 125])
def test_the_ends_of_the_scales_range(exponent: int) -> None:
    packed, scales = torch.arange(128, dtype=torch.uint8).view(8, 16), scales_of(torch.full((8, 1), exponent))
    values, chosen = mxfp4_to_fp8(packed, scales)
    expected = dequantize_mxfp4(packed, scales, dtype=torch.float64)
    assert torch.equal(dequantize_fp8(values, chosen).double(), expected)


def test_the_step_refuses_nan_scales_and_blocks_across_groups() -> None:
    packed, scales = torch.zeros(1, 16, dtype=torch.int8), torch.tensor([[255]], dtype=torch.uint8).view(torch.float8_e8m0fnu)
    with pytest.raises(ValueError, match="or NaN"):
        mxfp4_to_fp8(packed, scales)
    with pytest.raises(ValueError, match="got blocks of 48 columns, expected a multiple of 32"):
        mxfp4_to_fp8(packed, scales, block=(1, 48))
