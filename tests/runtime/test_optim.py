"""Muon orthogonalises each matrix on its own; the rest follows torch's AdamW."""

import pytest
import torch

from model.kernels.newton_schulz.op import orthogonalize
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


def test_learning_rate_warms_up_and_ends_at_its_ratio():
    config = OptimizerConfig(lr=1.0, warmup_steps=4, final_lr_ratio=0.1)
    rates = [learning_rate(step, config=config, steps=100) for step in range(101)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and max(rates) == 1.0
    assert rates[4:] == sorted(rates[4:], reverse=True) and rates[100] == pytest.approx(0.1)
