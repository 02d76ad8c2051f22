"""Newton-Schulz on Gram matrices against the iteration's definition."""

import pytest
import torch

from model.kernels.choice import choose
from model.kernels.newton_schulz import gram, op, reference


@pytest.fixture(autouse=True)
def triton_and_small_tiles(monkeypatch):
    """Run the kernels, with tiles that small matrices have several of, on memory filled with NaN."""
    choose("triton")
    monkeypatch.setattr(gram, "TILES", gram.TILES | {"TILE": 16, "BLOCK": 32})
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    choose(None)


@pytest.mark.parametrize("pair", [False, True], ids=["square_tiles", "wide_tiles"])
@pytest.mark.parametrize("size", [1, 16, 37, 64, 97], ids=str)
def test_symmetric_products(size, pair, monkeypatch):
    monkeypatch.setattr(gram, "TILES", gram.TILES | {"PAIR": pair})
    a = torch.randn(2, size, 64 if size == 64 else 75, dtype=torch.float16)  # 64: whole tiles only
    c = torch.randn(2, size, size, dtype=torch.float16)
    c += c.mT.clone()
    got = gram.symmetric(a, a, add=c, alpha=0.5, beta=-2.0)
    want = 0.5 * a.double() @ a.double().mT - 2.0 * c.double()
    torch.testing.assert_close(got.double(), want, rtol=2e-3, atol=2e-3)
    assert torch.equal(got, got.mT)


@pytest.mark.parametrize("shape", [(40, 90), (90, 40), (3, 32, 32), (2, 2, 20, 50), (1, 7)], ids=str)
def test_orthogonalize(shape):
    torch.manual_seed(0)
    matrices = torch.randn(shape)
    got, want = op.orthogonalize(matrices), reference.orthogonalize(matrices.double())
    assert got.dtype == torch.float32
    assert float((got - want).norm() / want.norm()) < 5e-3


@pytest.mark.parametrize("at_once", [1, 3 * 20 * 30, 1 << 28], ids=["one_by_one", "three", "all"])
def test_matrices_in_place(at_once, monkeypatch):
    monkeypatch.setattr(gram, "AT_ONCE", at_once)
    torch.manual_seed(0)
    shapes = [(20, 30), (4, 30, 20), (5, 20, 30), (2, 2, 30, 20), (30, 20)]
    matrices = [torch.randn(shape) for shape in shapes]
    wanted = [0.7 * reference.orthogonalize(matrix.double()) for matrix in matrices]
    op.orthogonalize_(matrices, 0.7)
    for matrix, want in zip(matrices, wanted, strict=True):
        assert float((matrix - want).norm() / want.norm()) < 5e-3


def test_a_scale_is_not_rounded_to_what_is_iterated():
    alone = torch.randn(2, 8, 12)
    scaled = alone.clone()
    op.orthogonalize_([alone], 1.0)
    op.orthogonalize_([scaled], 0.1)
    assert torch.equal(scaled, alone * 0.1)


@pytest.mark.parametrize("smallest", [1e-2, 1e-4, 0.0], ids=str)
def test_no_spectrum_makes_it_diverge(smallest):
    torch.manual_seed(1)
    u, _, v = torch.linalg.svd(torch.randn(64, 96).double(), full_matrices=False)
    values = torch.linspace(1, 0, 64).double().pow(4) * (1 - smallest) + smallest
    got = op.orthogonalize((u * values) @ v)
    assert float(torch.linalg.matrix_norm(got, 2)) < 1.05


def test_zeros_stay_zeros():
    assert not op.orthogonalize(torch.zeros(2, 8, 12)).any()
