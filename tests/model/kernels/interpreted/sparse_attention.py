"""The Triton kernels of sparse attention equal their definition, in value and gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.config import ModelConfig
from model.kernels import choice
from model.kernels.indexer.reference import top_entries
from model.kernels.sparse_attention import fused_backward, launch, listed, reference
from model.kernels.sparse_attention.op import sparse_attention
from model.layout import PackedRow

CONFIG = ModelConfig(
    num_hidden_layers=2, compress_ratios=[4, 8], num_nextn_predict_layers=0, head_dim=16, qk_rope_head_dim=8, sliding_window=24
)
KINDS = {"window": 0, "all": 4, "selected": 4, "heavy": 8}


@pytest.fixture(autouse=True)
def _triton() -> None:
    """Run the kernels."""
    choice.choose("triton")


def case(lengths: list[int], kind: str, *, heads: int = 3, width: int = 16, config: ModelConfig = CONFIG, selected: int = 5) -> dict:
    """Make random inputs of a packed row, fp32."""
    total, ratio = sum(lengths), KINDS[kind]
    row = PackedRow(config, torch.tensor([0, *lengths]).cumsum(0), total)
    make = {"dtype": torch.float32}
    inputs = {"q": torch.randn(total, heads, width, **make), "kv": torch.randn(total, width, **make), "ckv": None, "indices": None}
    inputs["sink"] = torch.randn(heads, **make)
    if ratio:
        inputs["ckv"] = torch.randn(len(row.entries[ratio].first), width, **make)
    if kind == "selected":
        most = max(row.entries[4].most, 1)
        hidden = torch.arange(most) >= row.entries[4].visible[:, None]
        scores = torch.rand(total, most).masked_fill(hidden, -torch.inf)
        inputs["indices"] = top_entries(scores, min(selected, most))
    return {"row": row, "ratio": ratio, "inputs": inputs, "grad": torch.randn(total, heads, width, **make)}


def evaluate(op, case: dict, dtype: torch.dtype) -> list[Tensor]:  # type: ignore[no-untyped-def]
    """Return the output and the gradients of q, kv, sink and ckv."""
    inputs = {n: t.to(dtype).requires_grad_() if t is not None and t.is_floating_point() else t for n, t in case["inputs"].items()}
    out = op(*(inputs[name] for name in ("q", "kv", "ckv", "indices", "sink")), row=case["row"], ratio=case["ratio"])
    leaves = [inputs[name] for name in ("q", "kv", "sink", "ckv") if inputs[name] is not None]
    grads = torch.autograd.grad(out, leaves, case["grad"].to(dtype), allow_unused=True)
    return [out, *(torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads))]


@pytest.mark.parametrize("lengths", [[1], [7], [27, 3, 1, 14]], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_definition(lengths: list[int], kind: str) -> None:
    torch.manual_seed(0)
    x = case(lengths, kind)
    for got, expected in zip(evaluate(sparse_attention, x, torch.float32), evaluate(reference.sparse_attention, x, torch.float32)):
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("heads", [1, 16, 80])
def test_any_number_of_heads(heads: int) -> None:
    torch.manual_seed(1)
    x = case([9, 20], "selected", heads=heads, width=32)
    for got, expected in zip(evaluate(sparse_attention, x, torch.float32), evaluate(reference.sparse_attention, x, torch.float32)):
        torch.testing.assert_close(got, expected, atol=3e-5, rtol=1e-4)


def test_scattered_gradient_equals_the_owned() -> None:
    torch.manual_seed(2)
    x = case([60, 13], "selected", selected=3)
    owned = evaluate(sparse_attention, x, torch.float32)
    torch.use_deterministic_algorithms(False)
    launch.DENSE, before = 0, launch.DENSE
    try:
        scattered = evaluate(sparse_attention, x, torch.float32)
    finally:
        launch.DENSE = before
    for got, expected in zip(scattered, owned):
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("scattered", [False, True], ids=["owned", "scattered"])
@pytest.mark.parametrize("kind", KINDS)
def test_stretches_of_queries_give_the_same_gradients(kind: str, scattered: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(7)
    x = case([43, 3, 30], kind)
    whole = evaluate(sparse_attention, x, torch.float32)
    torch.use_deterministic_algorithms(not scattered, warn_only=True)
    monkeypatch.setattr(launch, "DENSE", 0 if scattered else launch.DENSE)
    monkeypatch.setattr(fused_backward, "STORED", 2 * 3 * 4 * (24 + 19) * 17)
    for got, expected in zip(evaluate(sparse_attention, x, torch.float32), whole):
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)


def test_queries_that_select_nothing_see_their_window() -> None:
    torch.manual_seed(3)
    x = case([40], "selected")
    x["inputs"]["indices"].fill_(-1)
    got = evaluate(sparse_attention, x, torch.float32)
    for value, expected in zip(got, evaluate(reference.sparse_attention, x, torch.float32)):
        torch.testing.assert_close(value, expected, atol=2e-5, rtol=1e-4)
    assert not got[-1].any()


def test_a_sink_above_all_scores_takes_the_output() -> None:
    torch.manual_seed(4)
    x = case([12], "all")
    x["inputs"]["sink"].fill_(300.0)
    got = evaluate(sparse_attention, x, torch.float32)
    assert all(bool(value.isfinite().all()) for value in got)
    torch.testing.assert_close(got[0], torch.zeros_like(got[0]), atol=1e-20, rtol=0)


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("values", [32, 48], ids=["sink", "latents"])
def test_lists_of_rows_in_a_cache(parts: int, values: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(5)
    monkeypatch.setattr(listed, "LEAST", 150 // parts)
    monkeypatch.setattr(listed, "NARROW", listed.NARROW | {"BLOCK": 16})
    latents = values == 48
    q, keys, sink = torch.randn(4, 5, values), torch.randn(400, values), torch.randn(5)
    rows = torch.stack([torch.randperm(400)[:150] for _ in range(4)]).int()
    count = torch.tensor([150, 1, 70, 0], dtype=torch.int32)
    got = listed.attend_latents(q, keys, rows, count, values=32) if latents else listed.attend_listed(q, keys, rows, count, sink)
    assert got.shape == (4, 5, 32)
    for i in range(4):
        mine = keys[rows[i, : count[i]].long()]
        scores = q[i] @ mine.T * (1.0 if latents else 32**-0.5)
        scores = torch.cat([scores, torch.full((5, 1), -1e30) if latents else sink[:, None]], 1)
        torch.testing.assert_close(got[i], scores.softmax(1)[:, :-1] @ mine[:, :32], atol=2e-5, rtol=1e-4)


def test_keys_in_another_dtype_get_gradients_in_theirs() -> None:
    torch.manual_seed(6)
    x = case([20], "all")
    inputs = x["inputs"]
    q, kv, ckv = inputs["q"].requires_grad_(), inputs["kv"].bfloat16().requires_grad_(), inputs["ckv"].requires_grad_()
    out = sparse_attention(q, kv, ckv, None, inputs["sink"], row=x["row"], ratio=4)
    assert [g.dtype for g in torch.autograd.grad(out, (q, kv, ckv), x["grad"])] == [torch.float32, torch.bfloat16, torch.float32]
