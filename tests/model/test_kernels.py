"""Every operation equals its plain definition, in value and gradient."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from model.config import ModelConfig
from model.kernels.choice import choose
from model.kernels.experts import reference as experts_reference
from model.kernels.experts.op import routed_experts
from model.kernels.hyper_connections import op as hyper_op
from model.kernels.hyper_connections import reference as hyper_reference
from model.kernels.indexer.reference import select, top_entries
from model.kernels.sinkhorn import reference as sinkhorn_reference
from model.kernels.sinkhorn.op import sinkhorn
from model.kernels.sparse_attention import blocked
from model.kernels.sparse_attention import reference as attention_reference
from model.kernels.sparse_attention.op import sparse_attention
from model.layout import PackedRow
from model.linear import GroupedLinear

CONFIG = ModelConfig(
    num_hidden_layers=2, compress_ratios=[4, 128], num_nextn_predict_layers=0, head_dim=16, qk_rope_head_dim=8, sliding_window=24
)


@pytest.fixture
def as_on_a_gpu() -> Iterator[None]:
    """Take the way that a GPU takes; these tests get along without a kernel on it."""
    choose("triton")
    yield
    choose(None)


@pytest.mark.parametrize("iterations", [1, 2, 20])
def test_sinkhorn(iterations: int) -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, 4, 5, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(sinkhorn(logits, iterations, 1e-6), sinkhorn_reference.sinkhorn(logits, iterations, 1e-6))
    assert torch.autograd.gradcheck(lambda x: sinkhorn(x, iterations, 1e-6), logits)


@pytest.mark.parametrize("spread", [0.0, 0.01, 0.1, 1.0, 5.0])
def test_sinkhorn_that_stops_early_equals_all_its_iterations(spread: float) -> None:
    torch.manual_seed(1)
    logits = spread * torch.randn(4, 4, 50) + 2 * torch.eye(4)[:, :, None]  # a settled iteration whose gradient has not settled
    logits.requires_grad_()
    grad = torch.randn(4, 4, 50)
    got, expected = sinkhorn(logits, 20, 1e-6), sinkhorn_reference.sinkhorn(logits, 20, 1e-6)
    torch.testing.assert_close(got, expected, atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(*(torch.autograd.grad(out, logits, grad)[0] for out in (got, expected)), atol=2e-6, rtol=2e-5)


def test_sinkhorn_is_nearly_doubly_stochastic() -> None:
    comb = sinkhorn(torch.randn(4, 4, 100), 20, 1e-6)
    torch.testing.assert_close(comb.sum(0), torch.ones(4, 100), atol=1e-4, rtol=0)
    torch.testing.assert_close(comb.sum(1), torch.ones(4, 100), atol=1e-2, rtol=0)


def test_hyper_connections() -> None:
    torch.manual_seed(6)
    inputs = [torch.randn(5, 4, 6), torch.randn(24, 24) * 0.3, torch.randn(24), torch.tensor([1.0, 0.7, -1.3]), torch.randn(5, 6)]
    inputs = [t.double().requires_grad_() for t in inputs]

    def layer(kernels, streams, fn, base, scale, factor):  # type: ignore[no-untyped-def]
        x, post, comb = kernels.mix_in(streams, fn, base, scale, config=replace(CONFIG, hc_sinkhorn_iters=3))
        return kernels.mix_out(x * factor, streams, post, comb)

    torch.testing.assert_close(layer(hyper_op, *inputs), layer(hyper_reference, *inputs))
    assert torch.autograd.gradcheck(lambda *args: layer(hyper_op, *args), inputs)


def test_experts() -> None:
    torch.manual_seed(1)
    x = torch.randn(37, 16, requires_grad=True)
    matrices = tuple(torch.randn(shape, requires_grad=True) for shape in ((6, 24, 16), (6, 16, 24), (6, 24, 16)))
    indices = torch.rand(37, 5).topk(2).indices  # the sixth expert gets nothing
    weights = torch.rand(37, 2, requires_grad=True)
    grad = torch.randn(37, 16)
    results = []
    for op in (routed_experts, experts_reference.routed_experts):
        out = op(x, indices, weights, matrices, limit=2.0)
        results.append((out, *torch.autograd.grad(out, (x, weights, *matrices), grad)))
    for got, expected in zip(*results):
        torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-4)
    with torch.no_grad():  # the decoding path
        torch.testing.assert_close(routed_experts(x, indices, weights, matrices, limit=2.0), results[1][0], atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("chunk", [1 << 24, 4000], ids=["one_chunk", "many_chunks"])
@pytest.mark.parametrize("lengths", [[1], [7], [128], [300, 5, 1, 140, 37]], ids=str)
@pytest.mark.parametrize("kind", ["window", "all", "selected", "hca"])
def test_sparse_attention(lengths: list[int], kind: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocked, "CHUNK", chunk)
    torch.manual_seed(2)
    total, ratio = sum(lengths), {"window": 0, "hca": 128}.get(kind, 4)
    row = PackedRow(CONFIG, torch.tensor([0, *lengths]).cumsum(0), total)
    q, kv, sink = torch.randn(total, 3, 16), torch.randn(total, 16), torch.randn(3)
    ckv = torch.randn(len(row.entries[ratio].first), 16) if ratio else None
    indices = None
    if kind == "selected":
        scores = torch.rand(total, 75).masked_fill(torch.arange(75) >= row.entries[4].visible[:, None], float("-inf"))
        indices = top_entries(scores, 5)
    inputs = [t.requires_grad_() for t in (q, kv, sink, ckv) if t is not None]
    grad = torch.randn(total, 3, 16)
    results = []
    for op in (sparse_attention, attention_reference.sparse_attention):
        out = op(q, kv, ckv, indices, sink, row=row, ratio=ratio)
        results.append((out, *torch.autograd.grad(out, inputs, grad, allow_unused=True)))
    for got, expected in zip(*results):
        torch.testing.assert_close(got, torch.zeros_like(got) if expected is None else expected, atol=2e-5, rtol=1e-4)


def test_sparse_attention_refuses_wrong_shapes() -> None:
    row = PackedRow(CONFIG, torch.tensor([0, 9]), 9)
    with pytest.raises(ValueError, match="ckv"):
        sparse_attention(torch.zeros(9, 2, 16), torch.zeros(9, 16), torch.zeros(3, 16), None, torch.zeros(2), row=row, ratio=4)


def test_heads_without_kernels_are_attended_to_in_plain_torch_and_the_log_says_so_once(
    as_on_a_gpu: None, caplog: pytest.LogCaptureFixture
) -> None:
    row = PackedRow(CONFIG, torch.tensor([0, 9]), 9)
    q, kv, sink = torch.randn(9, 2, 44), torch.randn(9, 44), torch.zeros(2)
    out = [sparse_attention(q, kv, None, None, sink, row=row, ratio=0) for _ in range(2)]
    for each in out:
        torch.testing.assert_close(each, attention_reference.sparse_attention(q, kv, None, None, sink, row=row, ratio=0))
    assert caplog.text.count("heads of 44 channels") == 1


def test_grouped_products_keep_the_weight_itself(as_on_a_gpu: None) -> None:
    torch.manual_seed(3)
    grouped = GroupedLinear(12, 5, 3)
    torch.nn.init.normal_(grouped.weight)
    x, grad = torch.randn(7, 36, requires_grad=True), torch.randn(7, 15)
    out = grouped(x)
    assert any(kept is grouped.weight for kept in out.grad_fn.next_functions[0][0].saved_tensors)
    got = (out, *torch.autograd.grad(out, (x, grouped.weight), grad))
    choose("reference")
    out = grouped(x)
    for each, want in zip(got, (out, *torch.autograd.grad(out, (x, grouped.weight), grad)), strict=True):
        torch.testing.assert_close(each, want)


def test_top_entries_breaks_ties_to_the_lower_number() -> None:
    scores = torch.tensor([[0.0, 1.0, 0.0, -0.0, 0.0], [-1.0, float("-inf"), -1.0, 2.0, -3.0], [float("-inf")] * 5])
    assert top_entries(scores, 3).tolist() == [[1, 0, 2], [3, 0, 2], [-1, -1, -1]]


def test_select_keeps_the_best_visible_entries() -> None:
    torch.manual_seed(3)
    lengths = [90, 3, 61]
    row = PackedRow(CONFIG, torch.tensor([0, *lengths]).cumsum(0), 154)
    q, weights, keys = torch.randn(154, 8, 16), torch.randn(154, 8), torch.randn(22 + 15, 16)
    got = select(q, keys, weights, row=row, ratio=4, count=6)
    scores = torch.einsum("th,thc->tc", weights, torch.einsum("thk,ck->thc", q, keys).relu())
    for token in range(154):
        low, seen = int(row.entries[4].base[token]), int(row.entries[4].visible[token])
        best = scores[token, low : low + seen].topk(min(6, seen)).indices
        assert sorted(i for i in got[token].tolist() if i >= 0) == sorted(best.tolist())
