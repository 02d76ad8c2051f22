"""Newton-Schulz on Gram matrices against the iteration's definition."""

import pytest
import torch

from model.kernels.choice import choose
from model.kernels.newton_schulz import gram, op, reference
from model.kernels.newton_schulz.plan import places, plan


@pytest.fixture(autouse=True)
def triton_and_small_tiles(monkeypatch):
    """Run the kernels, with tiles that small matrices have several of."""
    choose("triton")
    monkeypatch.setattr(gram, "TILES", gram.TILES | {"TILE": 32, "BLOCK": 32})


@pytest.mark.parametrize("depth", [32, 96], ids=str)
def test_symmetric_products_of_many_sizes(depth):
    shapes = [(2, 32, depth), (1, 128, depth), (3, 96, 32)]
    layout = plan(tuple(shapes), 32, 32, torch.device("cpu"))
    x = torch.randn(layout.numbers, dtype=torch.float16)
    c, out, second = (torch.full((layout.gram_numbers,), float("nan"), dtype=torch.float16) for _ in range(3))
    for group in layout.groups:
        noise = torch.randn(group.count, group.size, group.size)
        group.of_grams(c).copy_(noise + noise.mT)
    gram.symmetric(layout.grams, x, x, out, add=c, alpha=0.5, beta=-2.0, shifted=(second, 3.0))
    assert sum(group.count for group in layout.groups) == 6
    for group in layout.groups:
        lines, got = group.of_lines(x).double(), group.of_grams(out)
        want = 0.5 * lines @ lines.mT - 2.0 * group.of_grams(c).double()
        torch.testing.assert_close(got.double(), want, rtol=2e-3, atol=2e-3)
        assert torch.equal(got, got.mT)
        assert torch.equal(group.of_grams(second), got + 3.0 * torch.eye(group.size, dtype=torch.float16))


def test_matrices_of_one_padded_size_lie_together():
    layout = plan(((24, 90), (2, 60, 20), (40, 40), (90, 30)), 32, 32, torch.device("cpu"))
    assert [(group.count, group.size, group.depth) for group in layout.groups] == [(1, 64, 64), (2, 32, 96), (2, 32, 64)]
    begins, aligned = places(layout, (8, 5000, 9000, 12000))
    assert begins.tolist() == [9000, 8, 12000, 5000, 6200] and not aligned
    layout = plan(((24, 92), (2, 60, 20)), 32, 32, torch.device("cpu"))
    assert places(layout, (0, 4))[1] and not places(layout, (0, 2))[1]
    layout = plan(((24, 90), (2, 60, 20), (40, 40), (90, 30)), 32, 32, torch.device("cpu"))
    assert layout.owners.tolist() == [0] * 4 + [1] * 3 + [2] * 3 + [3] * 2 + [4] * 2
    assert layout.matrices[3].tolist() == [10, 60, 20, 64 * 64 + 2 * 32 * 96, 64]


@pytest.mark.parametrize("shape", [(40, 90), (90, 40), (3, 32, 32), (2, 2, 20, 50), (1, 7)], ids=str)
def test_orthogonalize(shape):
    torch.manual_seed(0)
    matrices = torch.randn(shape)
    got, want = op.orthogonalize(matrices), reference.orthogonalize(matrices.double())
    assert got.dtype == torch.float32
    assert float((got - want).norm() / want.norm()) < 5e-3


@pytest.mark.parametrize(
    ("at_once", "dtype"),
    [(1, torch.float32), (3 * 32 * 32, torch.float32), (1 << 28, torch.bfloat16)],
    ids=["one_by_one", "three", "all_in_bf16"],
)
def test_matrices_of_many_shapes_in_place(at_once, dtype, monkeypatch):
    monkeypatch.setattr(gram, "AT_ONCE", at_once)
    torch.manual_seed(0)
    shapes = [(20, 30), (4, 30, 20), (5, 20, 30), (2, 2, 30, 20), (30, 20), (3, 50), (2, 61, 17), (70, 80)]
    flat = torch.randn(9 + sum(torch.Size(shape).numel() + 1 for shape in shapes)).to(dtype)
    matrices, gaps, at = [], [torch.arange(9)], 9
    for shape in shapes:
        count = torch.Size(shape).numel()
        matrices.append(flat[at : at + count].view(shape))
        at += count + 1
        gaps.append(torch.tensor([at - 1]))
    before = flat.clone()
    wanted = [0.7 * max(each.shape[-2:]) ** 0.5 * reference.orthogonalize(each.double()) for each in matrices]
    op.orthogonalize_(matrices[::-1], 0.7)
    for matrix, want in zip(matrices, wanted, strict=True):
        assert float((matrix - want).norm() / want.norm()) < 5e-3
    assert torch.equal(flat[torch.cat(gaps)], before[torch.cat(gaps)])


def test_matrices_that_own_their_memory():
    matrices = [torch.randn(shape) for shape in [(8, 12), (64, 128), (12, 8)]]
    wanted = [0.1 * max(each.shape) ** 0.5 * reference.orthogonalize(each.double()) for each in matrices]
    op.orthogonalize_(matrices, 0.1)
    for matrix, want in zip(matrices, wanted, strict=True):
        assert float((matrix - want).norm() / want.norm()) < 5e-3


def test_a_scale_is_not_rounded_to_what_is_iterated():
    alone = torch.randn(2, 8, 12)
    scaled = alone.clone()
    op.orthogonalize_([alone], 1.0)
    op.orthogonalize_([scaled], 0.1)
    torch.testing.assert_close(scaled, alone * 0.1, rtol=1e-6, atol=0)


@pytest.mark.parametrize("smallest", [1e-2, 1e-4, 0.0], ids=str)
def test_no_spectrum_makes_it_diverge(smallest):
    torch.manual_seed(1)
    u, _, v = torch.linalg.svd(torch.randn(64, 96).double(), full_matrices=False)
    values = torch.linspace(1, 0, 64).double().pow(4) * (1 - smallest) + smallest
    got = op.orthogonalize((u * values) @ v)
    assert float(torch.linalg.matrix_norm(got, 2)) < 1.05


def test_zeros_stay_zeros():
    assert not op.orthogonalize(torch.zeros(2, 8, 12)).any()


@pytest.mark.parametrize("scale", [1e-10, 1e-20, 1e-23, 1e-24, 1e-27, 1e-34, 0.0], ids=str)
@pytest.mark.parametrize("implementation", ["triton", "reference"])
def test_an_idle_matrix_stays_finite(implementation, scale):
    """The momentum of an expert without tokens passes through all of these."""
    choose(implementation)
    idle, busy = torch.randn(24, 40) * scale, torch.randn(24, 40)
    alone = [busy.clone()]
    op.orthogonalize_(alone, 1.0)
    op.orthogonalize_([idle, busy], 1.0)
    assert float(idle.abs().max()) <= 40**0.5 and busy.isfinite().all()
    torch.testing.assert_close(busy, alone[0], rtol=1e-3, atol=1e-3)


def test_not_a_number_stays_in_its_matrix():
    broken, whole = torch.randn(24, 40), torch.randn(24, 40)
    broken[3, 5] = float("nan")
    op.orthogonalize_([broken, whole], 1.0)
    assert broken.isnan().all() and whole.isfinite().all()


def test_no_matrices():
    assert op.orthogonalize(torch.empty(0, 3, 4)).shape == (0, 3, 4)
