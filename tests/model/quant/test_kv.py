"""The key-value row: its bytes, its grid, other widths."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.quant.fp8 import dequantize_fp8, quantize_fp8
from model.quant.kv import kv_grid, pack_kv, row_bytes, unpack_kv
from model.quant.qat import fake_quantize_kv


def test_a_row_of_the_release_has_584_bytes_in_its_order() -> None:
    x = torch.randn(3, 512)
    rows = pack_kv(x, rope_dims=64)
    values, scales = quantize_fp8(x[:, :448], (1, 64), floor=1e-4)
    assert rows.shape == (3, 584) == (3, row_bytes(512, 64))
    assert torch.equal(rows[:, :448], values.view(torch.uint8))
    assert torch.equal(rows[:, 448:576].contiguous().view(torch.bfloat16), x[:, 448:].bfloat16())
    assert torch.equal(rows[:, 576:583], scales.view(torch.uint8)) and not rows[:, 583].any()


@settings(deadline=None)
@given(
    width=st.integers(1, 700),
    part=st.floats(0, 1),
    lead=st.sampled_from([(), (1,), (3,), (2, 3), (0, 4)]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_rows_of_any_width_come_back_on_the_grid(width: int, part: float, lead: tuple[int, ...], dtype: torch.dtype) -> None:
    rope_dims = round(part * width)
    x = torch.randn(*lead, width, generator=torch.Generator().manual_seed(width)).to(dtype)
    rows = pack_kv(x, rope_dims=rope_dims)
    assert rows.shape == (*lead, row_bytes(width, rope_dims)) and rows.dtype == torch.uint8
    back = unpack_kv(rows, width, rope_dims=rope_dims, dtype=dtype)
    assert back.dtype == dtype and torch.equal(back, kv_grid(x, rope_dims=rope_dims))
    assert torch.equal(back, fake_quantize_kv(x, rope_dims=rope_dims))
    assert torch.equal(back[..., width - rope_dims :], x[..., width - rope_dims :].bfloat16().to(dtype))
    assert torch.equal(kv_grid(back, rope_dims=rope_dims), back)


def test_tiles_have_scales_of_their_own() -> None:
    x = torch.ones(1, 512) * 0.3
    x[0, 130] = 1000.0
    rounded = kv_grid(x, rope_dims=64)
    expected = dequantize_fp8(*quantize_fp8(x[:, 128:192], (1, 64)), block=(1, 64))
    assert torch.equal(rounded[:, 128:192], expected)
    assert rounded[0, 0] == rounded[0, 192] == torch.tensor(0.3125)


def test_tiny_tiles_use_the_floor_of_the_release() -> None:
    x = torch.full((1, 72), 2.0**-31 * 0.49)  # the floor gives the scale 2^-22, of which e4m3 has steps of 2^-9
    assert not kv_grid(x, rope_dims=8)[:, :64].any() and kv_grid(2 * x, rope_dims=8)[0, 0] == 2.0**-31


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_bad_number_marks_its_tile(bad: float) -> None:
    x = torch.ones(2, 512)
    x[1, 70] = bad
    for rounded in (kv_grid(x, rope_dims=64), unpack_kv(pack_kv(x, rope_dims=64), 512, rope_dims=64)):
        assert rounded.isnan()[1, 64:128].all() and rounded.isnan().sum() == 64


def test_contradicting_widths_are_refused() -> None:
    with pytest.raises(ValueError, match="got rows of 584 bytes, expected 48 for 32 dimensions"):
        unpack_kv(torch.zeros(1, 584, dtype=torch.uint8), 32, rope_dims=8)
    with pytest.raises(ValueError, match="rope_dims: got 64, expected 0 to the width 32"):
        pack_kv(torch.zeros(1, 32), rope_dims=64)
