"""The quantisation kernels against `model.quant`: every byte is the same."""

import pytest
import torch

from model.kernels.quant import op
from model.quant.fp8 import encode_fp8
from model.quant.grid import E2M1, E4M3, onto_grid
from model.quant.mxfp4 import quantize_mxfp4


@pytest.fixture(autouse=True)
def small_programs(monkeypatch):
    """Give every program few groups."""
    monkeypatch.setattr(op, "ELEMENTS", 512)


def numbers(shape):
    """Draw numbers of many magnitudes, with exact grid points, ties and zeros among them."""
    torch.manual_seed(7)
    x = torch.randn(shape) * torch.exp2(torch.randint(-20, 20, (*shape[:-1], 1)).float())
    x[..., ::7] = torch.randint(-12, 13, x[..., ::7].shape) * 0.25
    x[..., 1::11] = 0.0
    return x


@pytest.mark.parametrize("shape", [(1, 1), (3, 128), (5, 200), (2, 3, 256), (7, 30)], ids=str)
def test_fp8(shape):
    torch.manual_seed(8)  # numbers that need no rounding: the interpreter forgets the carry of a mantissa that rounds up
    x = torch.randint(-15, 16, shape) * torch.exp2(torch.randint(-3, 4, shape).float())
    x *= torch.exp2(torch.randint(-30, 30, (*shape[:-1], 1)).float())
    for floor in (0.0, 1e-4):
        values, scales = op.quantize_fp8(x, group=128, floor=floor)
        want, want_scales = encode_fp8(x, (1, 128), floor=floor)
        assert torch.equal(scales.view(torch.uint8), want_scales.view(torch.uint8))
        if floor == 0.0:
            assert torch.equal(values.view(torch.uint8), want.view(torch.uint8))


@pytest.mark.parametrize("shape", [(1, 2), (3, 128), (5, 200), (2, 3, 256), (7, 30)], ids=str)
def test_mxfp4(shape):
    x = numbers(shape)
    packed, scales = op.quantize_mxfp4(x)
    want, want_scales = quantize_mxfp4(x)
    assert torch.equal(scales.view(torch.uint8), want_scales.view(torch.uint8))
    assert torch.equal(packed, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("grid", "group"), [(E4M3, 128), (E2M1, 32)], ids=["fp8", "mxfp4"])
def test_fake_quantisation(grid, group, dtype):
    for shape in ((3, 128), (5, 200), (2, 3, 64)):
        x = numbers(shape).to(dtype)
        got, want = op.fake_quantize(x, group=group, grid=grid), onto_grid(x, grid, block=(1, group))
        assert got.dtype == dtype
        assert torch.equal(got, want)


@pytest.mark.parametrize(("grid", "group"), [(E4M3, 64), (E2M1, 32)], ids=["fp8", "mxfp4"])
@pytest.mark.parametrize("shape", [(1, 1), (130, 200), (64, 257)], ids=str)
def test_both_orientations(grid, group, shape):
    x = numbers(shape)
    rows, columns = op.fake_quantize_both(x, group=group, grid=grid, floor=1e-4)
    assert torch.equal(rows, onto_grid(x, grid, block=(1, group), floor=1e-4))
    assert torch.equal(columns, onto_grid(x.T.contiguous(), grid, block=(1, group), floor=1e-4).T)


def test_groups_that_are_not_finite_are_marked():
    x = torch.ones(3, 64)
    x[0, 5], x[1, 40] = float("inf"), float("nan")
    _, scales = op.quantize_mxfp4(x)
    assert (scales.view(torch.uint8) == 255).tolist() == [[True, False], [False, True], [False, False]]
    assert op.fake_quantize(x, group=32, grid=E2M1).isnan().sum(1).tolist() == [32, 32, 0]
    assert op.quantize_fp8(x, group=64)[1].isnan().flatten().tolist() == [True, True, False]
