"""Scales and rounding are those of the formats' definitions, bit for bit."""

from __future__ import annotations

import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.quant.grid import E2M1, E4M3, NAN_BYTE, onto_grid, powers, round_to_grid_, scale_bytes

TYPES = {"e2m1": (E2M1, ml_dtypes.float4_e2m1fn), "e4m3": (E4M3, ml_dtypes.float8_e4m3fn)}
magnitudes = st.floats(0, width=32, allow_nan=False, allow_infinity=False)


def exact_byte(amax: float, largest: float) -> int:
    """The least e >= 1 with largest * 2^(e - 127) >= amax, in rational arithmetic."""
    ratio, byte = Fraction(amax) / Fraction(largest), 1
    if ratio > 0:
        byte = max(1, math.frexp(float(ratio))[1] + 127 - 2)
    while Fraction(2) ** (byte - 127) < ratio:
        byte += 1
    return byte


@pytest.mark.parametrize("grid", [E2M1, E4M3], ids=["e2m1", "e4m3"])
@settings(deadline=None)
@given(amax=magnitudes)
def test_a_scale_is_the_least_power_of_two_that_suffices(grid, amax: float) -> None:
    assert scale_bytes(torch.tensor(amax), grid.largest).item() == exact_byte(amax, grid.largest)


@pytest.mark.parametrize("grid", [E2M1, E4M3], ids=["e2m1", "e4m3"])
def test_a_scale_steps_exactly_where_the_greatest_value_is_passed(grid) -> None:
    tops = grid.largest * 2.0 ** np.arange(-130, 119, dtype=np.float64)
    tops = tops[tops > 2.0**-118].astype(np.float32)
    exactly, above = (scale_bytes(torch.from_numpy(t), grid.largest).int() for t in (tops, np.nextafter(tops, np.float32(np.inf))))
    assert torch.equal(powers(exactly.to(torch.uint8)), torch.from_numpy(tops / np.float32(grid.largest)))
    assert torch.equal(above, exactly + 1)


@settings(deadline=None)
@given(first=magnitudes, second=magnitudes)
def test_scales_are_monotonic(first: float, second: float) -> None:
    low, high = scale_bytes(torch.tensor(sorted((first, second))), 6.0).tolist()
    assert low <= high


@pytest.mark.parametrize("bad", [math.inf, math.nan, -math.nan])
def test_a_scale_of_what_is_not_finite_is_nan(bad: float) -> None:
    byte = scale_bytes(torch.tensor([1.0, bad]), 448.0, floor=1e-4)
    assert byte[1] == NAN_BYTE and powers(byte)[1].isnan() and not powers(byte)[0].isnan()


def test_powers_are_those_of_the_ue8m0_type() -> None:
    byte = torch.arange(256, dtype=torch.uint8)
    expected = byte.numpy().view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    np.testing.assert_array_equal(powers(byte).numpy(), expected)


@pytest.mark.parametrize("name", TYPES)
def test_rounding_equals_the_oracle_on_every_bfloat16_and_around_every_midpoint(name: str) -> None:
    grid, oracle = TYPES[name]
    everything = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16).float()
    values = np.unique(np.arange(256, dtype=np.uint8).view(oracle).astype(np.float32)) if name == "e4m3" else np.arange(-12, 13) / 2
    values = np.sort(values[np.isfinite(values)]).astype(np.float32)
    middle = (values[1:] + values[:-1]) / 2
    edges = np.concatenate([values, middle, np.nextafter(middle, np.float32(np.inf)), np.nextafter(middle, np.float32(-np.inf))])
    x = torch.cat([everything[everything.abs() <= grid.largest], torch.from_numpy(edges)])
    expected = x.numpy().astype(oracle).astype(np.float32)
    np.testing.assert_array_equal(round_to_grid_(x.clone(), grid).numpy(), expected)


@pytest.mark.parametrize("name", TYPES)
@settings(deadline=None)
@given(x=st.floats(-1, 1, width=32), power=st.integers(-10, 2))
def test_rounding_equals_the_oracle_on_drawn_numbers(name: str, x: float, power: int) -> None:
    grid, oracle = TYPES[name]
    y = np.float32(x * 2.0**power * grid.largest / 4)
    assert round_to_grid_(torch.tensor([float(y)]), grid).item() == float(y.astype(oracle).astype(np.float32))


@pytest.mark.parametrize("grid", [E2M1, E4M3], ids=["e2m1", "e4m3"])
@settings(deadline=None)
@given(seed=st.integers(0, 2**31), rows=st.integers(1, 9), columns=st.integers(1, 70), spread=st.integers(0, 60))
def test_rounding_blocks_is_idempotent_monotonic_and_bounded(grid, seed: int, rows: int, columns: int, spread: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.randint(-spread, spread + 1, (rows, columns), generator=generator)
    x = torch.randn(rows, columns, generator=generator) * 2.0**exponents
    once = onto_grid(x, grid, block=(4, 32))
    assert torch.equal(onto_grid(once, grid, block=(4, 32)), once)
    for row in range(0, rows, 4):
        for column in range(0, columns, 32):
            before, after = x[row : row + 4, column : column + 32].flatten(), once[row : row + 4, column : column + 32].flatten()
            assert (after[before.argsort()].diff() >= 0).all()
            step = 2.0 ** (grid.least_exponent - grid.mantissa_bits) * 2 * before.abs().max() / grid.largest
            relative = 2.0 ** -(grid.mantissa_bits + 1)
            assert ((after - before).abs() <= torch.maximum(relative * before.abs(), step / 2)).all()


def test_subnormal_numbers_are_rounded_like_others() -> None:
    tiny = torch.tensor([[2.0**-149, 2.0**-130, -(2.0**-127), 0.0]])
    assert torch.equal(onto_grid(tiny, E4M3, block=(1, 4)), torch.tensor([[0.0, 2.0**-130, -(2.0**-127), 0.0]]))
    assert torch.equal(onto_grid(tiny, E2M1, block=(1, 4)), torch.tensor([[0.0, 0.0, -(2.0**-127), 0.0]]))


def test_only_the_block_of_a_bad_number_becomes_nan() -> None:
    for bad in (math.inf, -math.inf, math.nan):
        x = torch.ones(4, 100)
        x[1, 40] = bad
        nan = onto_grid(x, E2M1, block=(2, 32)).isnan()
        assert nan[:2, 32:64].all() and nan.sum() == 64
