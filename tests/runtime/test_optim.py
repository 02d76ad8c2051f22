"""Muon orthogonalises each matrix on its own; the rest follows torch's AdamW."""

from types import SimpleNamespace

import pytest
import torch

from model.kernels.newton_schulz.op import orthogonalize, orthogonalize_
from runtime import zero_layouts
from runtime.config import OptimizerConfig
from runtime.optim import HybridOptimizer
from runtime.schedule import learning_rate


@pytest.mark.parametrize("shape", [(8, 8), (5, 12), (12, 5), (3, 16, 8)], ids=str)
def test_orthogonalize_brings_singular_values_to_one(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalize(matrices))
    assert (values - 1).abs().max() < 0.05


def test_orthogonalize_keeps_the_singular_vectors():
    matrix = torch.randn(6, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    u, _, vt = torch.linalg.svd(matrix, full_matrices=False)
    torch.testing.assert_close(orthogonalize(matrix), u @ vt, rtol=0, atol=0.05)


def test_first_muon_step_follows_the_papers_formula_for_each_expert_alone():
    config = OptimizerConfig(lr=0.1, weight_decay=0.5, update_rms=0.18)
    start = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(2))
    parameter = torch.nn.Parameter(start.clone())
    optimizer = HybridOptimizer([("experts.w1", parameter)], config)
    gradient = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(3))
    parameter.grad = gradient.clone()
    optimizer.step()
    for expert in range(2):
        direction = orthogonalize(1.95 * gradient[expert])
        expected = start[expert] * (1 - 0.1 * 0.5) - 0.1 * 0.18 * 6**0.5 * direction
        torch.testing.assert_close(parameter[expert].detach(), expected)
    rms = ((start * 0.95 - parameter.detach()) / 0.1).square().mean().sqrt()
    assert 0.15 < rms / 0.18 * (6 / 6) ** 0.5 < 1.1  # sqrt(max) * O of a 4x6 matrix has RMS 1


def test_orthogonalizing_in_place_is_orthogonalizing_each():
    shapes = [(5, 12), (12, 5), (7, 7), (3, 12, 5), (2, 2, 5, 12), (20, 12)]
    matrices = [torch.randn(shape, generator=torch.Generator().manual_seed(6)) for shape in shapes]
    wanted = [0.3 * max(matrix.shape[-2:]) ** 0.5 * orthogonalize(matrix) for matrix in matrices]
    orthogonalize_(matrices, 0.3)
    for matrix, want in zip(matrices, wanted, strict=True):
        torch.testing.assert_close(matrix, want)


def test_matrices_of_many_shapes_are_updated_as_each_alone():
    config = OptimizerConfig(lr=0.1, weight_decay=0.5)
    generator = torch.Generator().manual_seed(7)
    starts = [torch.randn(shape, generator=generator) for shape in [(4, 6), (6, 4), (3, 4, 6), (8, 8), (2, 6, 4), (4, 7)]]
    together, alone = ([torch.nn.Parameter(start.clone()) for start in starts] for _ in range(2))
    optimizers = [HybridOptimizer([(f"w{i}", p) for i, p in enumerate(together)], config)]
    optimizers += [HybridOptimizer([(f"w{i}", p)], config) for i, p in enumerate(alone)]
    for _ in range(3):
        for a, b in zip(together, alone, strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_ranks_share_of_a_buffer_holds_whole_matrices_updates_and_the_gaps_stay(ranks, monkeypatch):
    shapes, offsets = [torch.Size(s) for s in [(3, 4), (2, 2, 5), (7, 2)]], [0, 16, 40]
    buffer = torch.randn(60, generator=torch.Generator().manual_seed(8))
    expected = buffer.clone()
    for offset, shape in zip(offsets, shapes, strict=True):
        piece = expected[offset : offset + shape.numel()]
        piece.copy_(2 * piece + len(shape))
    layout = zero_layouts.ContiguousLayout(shapes, offsets, None)

    def transform(matrices):
        for matrix in matrices:
            matrix.mul_(2).add_(matrix.ndim)

    for rank, share in enumerate(buffer.chunk(ranks)):
        fake = SimpleNamespace(
            get_world_size=lambda _: ranks,
            get_rank=lambda _, rank=rank: rank,
            all_gather_into_tensor=lambda out, *_, **__: out.copy_(buffer),
        )
        monkeypatch.setattr(zero_layouts, "dist", fake)
        assert torch.equal(layout.update(share.clone(), transform), expected.chunk(ranks)[rank])


def test_vectors_embedding_and_head_follow_torch_adamw():
    config = OptimizerConfig(lr=0.01, weight_decay=0.1, eps=1e-8)
    names = ["norm.weight", "embed.weight", "head.weight"]
    shapes = [(7,), (5, 3), (5, 3)]
    mine = [torch.nn.Parameter(torch.randn(s, generator=torch.Generator().manual_seed(4))) for s in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in mine]
    optimizer = HybridOptimizer(zip(names, mine, strict=True), config)
    reference = torch.optim.AdamW(theirs, lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    generator = torch.Generator().manual_seed(5)
    for _ in range(4):
        for a, b in zip(mine, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        optimizer.step()
        reference.step()
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("counter", [int, lambda steps: torch.tensor(float(steps))], ids=["number", "older checkpoints' tensor"])
def test_adamw_goes_on_counting_where_a_checkpoint_ended(counter):
    def resumable():
        parameter = torch.nn.Parameter(torch.ones(5))
        return parameter, HybridOptimizer([("norm.weight", parameter)], OptimizerConfig(lr=0.01))

    def step(parameter, optimizer, seed):
        parameter.grad = torch.randn(5, generator=torch.Generator().manual_seed(seed))
        optimizer.step()

    whole, first, second = resumable(), resumable(), resumable()
    for seed in range(3):
        step(*whole, seed)
        step(*first, seed)
    saved = first[1].state_dict()
    for state in saved["state"].values():
        assert type(state["steps"]) is int
        state["steps"] = counter(state["steps"])
    second[0].data.copy_(first[0].data)
    second[1].load_state_dict(saved)
    step(*whole, 3)
    step(*second, 3)
    assert torch.equal(whole[0], second[0]) and second[1].state[second[0]]["steps"] == 4


def test_learning_rate_warms_up_and_ends_at_its_ratio():
    config = OptimizerConfig(lr=1.0, warmup_steps=4, final_lr_ratio=0.1)
    rates = [learning_rate(step, config=config, steps=100) for step in range(101)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and max(rates) == 1.0
    assert rates[4:] == sorted(rates[4:], reverse=True) and rates[100] == pytest.approx(0.1)
