"""The compressor's pooling with Triton against its definition, in value and gradient."""

import pytest
import torch

from model.config import ModelConfig
from model.kernels.pooling import fused, reference
from model.layout import PackedRow

CONFIG = ModelConfig(
    num_hidden_layers=2, compress_ratios=[4, 128], num_nextn_predict_layers=0, head_dim=16, qk_rope_head_dim=8, sliding_window=24
)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Give entries several tiles of channels and tokens."""
    monkeypatch.setattr(fused, "BLOCK", 8)
    monkeypatch.setattr(fused, "PROGRAMS", 12)


def shared_source(lengths, prompt):
    """Let all samples begin with the same `prompt` tokens."""
    source, computed = [], 0
    for number, length in enumerate(lengths):
        alike = 0 if number == 0 else prompt
        source += [*range(alike), *range(computed, computed + length - alike)]
        computed += length - alike
    return torch.tensor(source)


@pytest.mark.parametrize("prompt", [0, 9], ids=["apart", "shared"])
@pytest.mark.parametrize("ratio", [4, 128], ids=str)
@pytest.mark.parametrize("lengths", [[130, 300], [13, 21, 129, 11]], ids=str)
def test_pool(lengths, ratio, prompt):
    torch.manual_seed(1)
    source = shared_source(lengths, prompt) if prompt else None
    row = PackedRow(CONFIG, torch.tensor([0, *lengths]).cumsum(0), sum(lengths), source)
    overlaps, entries, width = ratio == 4, row.entries[ratio], 20
    channels = width * (2 if overlaps else 1)
    both = torch.randn(int(source.max()) + 1 if prompt else sum(lengths), 2 * channels + 3, requires_grad=True)
    ape = torch.randn(ratio, channels, requires_grad=True)
    grad = torch.randn(len(entries.first), width)
    results = []
    for run in (lambda *a: fused.pool(*a, overlaps=overlaps, shared=bool(prompt)), lambda *a: reference.pool(*a, overlaps=overlaps)):
        out = run(both[:, :channels], both[:, channels : 2 * channels], ape, entries)
        results.append((out, *torch.autograd.grad(out, (both, ape), grad)))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_no_entries():
    row = PackedRow(CONFIG, torch.tensor([0, 3, 5]), 5)
    kv, gate, ape = (torch.randn(rows, 40, requires_grad=True) for rows in (5, 5, 4))
    out = fused.pool(kv, gate, ape, row.entries[4], overlaps=True, shared=False)
    assert out.shape == (0, 20)
    assert [float(grad.abs().sum()) for grad in torch.autograd.grad(out.sum(), (kv, gate, ape))] == [0, 0, 0]
