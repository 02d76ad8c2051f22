"""The Triton kernels of sparse attention on a GPU: no further from fp32 than plain torch in bf16, at the sizes they are scheduled for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from model.config import ModelConfig
from model.kernels.sparse_attention import reference
from model.layout import PackedRow

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
CONFIG = ModelConfig(num_hidden_layers=2, compress_ratios=[4, 128], num_nextn_predict_layers=0, head_dim=512, sliding_window=128)
Inputs = tuple[PackedRow, int, dict[str, Tensor | None]]


def draw(lengths: list[int], ratio: int, *, heads: int = 64, width: int = 512, listed: int = 0) -> Inputs:
    """Draw fp32 inputs of a packed row; `listed` entries a query, or as many as it sees."""
    torch.manual_seed(0)
    total = sum(lengths)
    row = PackedRow(CONFIG, torch.tensor([0, *lengths], device="cuda").cumsum(0), total)
    x = {"q": torch.randn(total, heads, width, device="cuda"), "kv": torch.randn(total, width, device="cuda")}
    x |= {"ckv": None, "indices": None, "sink": torch.randn(heads, device="cuda")}
    if ratio:
        entries = row.entries[ratio]
        x["ckv"] = torch.randn(len(entries.first), width, device="cuda")
        if listed:
            scores = torch.rand(total, entries.most, device="cuda")
            scores.masked_fill_(torch.arange(entries.most, device="cuda") >= entries.visible[:, None], -1)
            best = scores.topk(min(listed, entries.most))
            x["indices"] = best.indices.masked_fill(best.values < 0, -1)
    return row, ratio, x


def eager(q: Tensor, kv: Tensor, ckv: Tensor | None, indices: Tensor | None, sink: Tensor, *, row: PackedRow, ratio: int) -> Tensor:
    """Compute as the reference does, but in the dtype of the inputs."""
    place = torch.arange(row.length, device=q.device)
    seen = (row.sample[:, None] == row.sample) & (place <= place[:, None]) & (place > place[:, None] - row.window)
    keys = kv
    if ckv is not None:
        entries = row.entries[ratio]
        number = torch.arange(len(ckv), device=q.device) - entries.base[:, None]
        visible = (number >= 0) & (number < entries.visible[:, None])
        if indices is not None:
            visible &= (number[:, :, None] == indices[:, None, :]).any(-1)
        seen, keys = torch.cat([seen, visible], 1), torch.cat([kv, ckv])
    scores = (torch.einsum("thk,sk->ths", q, keys) * q.shape[-1] ** -0.5).masked_fill(~seen[:, None], -torch.inf)
    scores = torch.cat([scores, sink.to(q.dtype)[None, :, None].expand(len(q), -1, 1)], -1)
    return torch.einsum("ths,sk->thk", scores.float().softmax(-1).to(q.dtype)[..., :-1], keys)


def evaluate(op: Callable[..., Tensor], drawn: Inputs, dtype: torch.dtype) -> list[Tensor]:
    """Return output and gradients of all inputs of any dtype at their bf16 values."""
    row, ratio, x = drawn
    x = {n: t.bfloat16().to(dtype).requires_grad_() if t is not None and t.is_floating_point() else t for n, t in x.items()}
    out = op(*x.values(), row=row, ratio=ratio)
    torch.manual_seed(1)
    grad = torch.randn(out.shape, device="cuda").bfloat16().to(dtype)
    return [out, *torch.autograd.grad(out, [t for t in x.values() if t is not None and t.requires_grad], grad)]


def error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


CASES = {
    "selected": ([333, 1, 5, 700], 4, {"listed": 100}),
    "heavy": ([100, 600], 128, {}),
    "window": ([77, 423], 0, {}),
    "many_heads": ([300], 4, {"heads": 128, "listed": 40}),
    "one_token": ([1], 0, {}),
    "narrow": ([150, 31], 4, {"heads": 8, "width": 64, "listed": 20}),
    "tiny": ([150, 31], 128, {"heads": 4, "width": 32}),
    "odd_heads": ([130], 4, {"heads": 24, "width": 512, "listed": 20}),
}


@pytest.mark.parametrize("owned", [True, False], ids=["owned", "scattered"])
@pytest.mark.parametrize("name", CASES)
def test_is_as_close_as_plain_torch(name: str, owned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    launch = pytest.importorskip("model.kernels.sparse_attention.launch")
    op = pytest.importorskip("model.kernels.sparse_attention.op").sparse_attention
    torch.use_deterministic_algorithms(owned, warn_only=True)
    monkeypatch.setattr(launch, "DENSE", launch.DENSE if owned else 0)
    lengths, ratio, sizes = CASES[name]
    drawn = draw(lengths, ratio, **sizes)
    exact = evaluate(reference.sparse_attention, drawn, torch.float32)
    plain, got = (evaluate(f, drawn, torch.bfloat16) for f in (eager, op))
    for mine, theirs, expected in zip(got, plain, exact):
        assert error(mine, expected) <= max(1.5 * error(theirs, expected), 4e-3)


def test_single_precision() -> None:
    op = pytest.importorskip("model.kernels.sparse_attention.op").sparse_attention
    drawn = draw([70, 20], 4, heads=4, width=512, listed=8)
    for got, expected in zip(evaluate(op, drawn, torch.float32), evaluate(reference.sparse_attention, drawn, torch.float32)):
        assert error(got, expected) < 1e-4


def test_owned_gradients_do_not_change_from_run_to_run() -> None:
    op = pytest.importorskip("model.kernels.sparse_attention.op").sparse_attention
    drawn = draw([900], 4, listed=200)
    first, second = (evaluate(op, drawn, torch.bfloat16) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("owned", [True, False], ids=["owned", "scattered"])
@pytest.mark.parametrize("name", ["selected", "heavy", "window"])
def test_stretches_of_queries_give_the_same_gradients(name: str, owned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    launch = pytest.importorskip("model.kernels.sparse_attention.launch")
    backward = pytest.importorskip("model.kernels.sparse_attention.fused_backward")
    op = pytest.importorskip("model.kernels.sparse_attention.op").sparse_attention
    torch.use_deterministic_algorithms(owned, warn_only=True)
    monkeypatch.setattr(launch, "DENSE", launch.DENSE if owned else 0)
    lengths, ratio, sizes = CASES[name]
    drawn = draw(lengths, ratio, **sizes)
    whole = evaluate(op, drawn, torch.bfloat16)
    monkeypatch.setattr(backward, "STORED", 1 << 22)
    for got, expected in zip(evaluate(op, drawn, torch.bfloat16), whole, strict=True):
        assert error(got, expected) < 4e-3


def test_queries_beyond_two_billion_numbers() -> None:
    op = pytest.importorskip("model.kernels.sparse_attention.op").sparse_attention
    torch.use_deterministic_algorithms(False)
    tokens = 2**16 + 300
    row = PackedRow(CONFIG, torch.tensor([0, 2**16, tokens], device="cuda"), tokens)
    last = PackedRow(CONFIG, torch.tensor([0, 300], device="cuda"), 300)
    q, kv = torch.randn(tokens, 64, 512, device="cuda", dtype=torch.bfloat16), torch.randn(tokens, 512, device="cuda").bfloat16()
    sink = torch.randn(64, device="cuda")
    whole = op(q, kv, None, None, sink, row=row, ratio=0)
    assert torch.equal(whole[-300:], op(q[-300:], kv[-300:], None, None, sink, row=last, ratio=0))


@pytest.mark.parametrize(("batch", "listed"), [(3, 700), (128, 640), (1, 64)])
def test_lists_of_rows_in_a_cache(batch: int, listed: int) -> None:
    attend_listed = pytest.importorskip("model.kernels.sparse_attention.listed").attend_listed
    torch.manual_seed(2)
    q, keys = torch.randn(batch, 64, 512, device="cuda").bfloat16(), torch.randn(batch * 1000, 512, device="cuda").bfloat16()
    sink, rows = torch.randn(64, device="cuda"), torch.randint(len(keys), (batch, listed), device="cuda", dtype=torch.int32)
    count = torch.randint(1, listed + 1, (batch,), device="cuda", dtype=torch.int32)
    mine = keys[rows.long()].float()
    scores = torch.einsum("bhk,bsk->bhs", q.float(), mine) * 512**-0.5
    scores.masked_fill_(torch.arange(listed, device="cuda") >= count[:, None, None], -torch.inf)
    weights = torch.cat([scores, sink[None, :, None].expand(batch, -1, 1)], 2).softmax(2)[..., :-1]
    assert error(attend_listed(q, keys, rows, count, sink), torch.einsum("bhs,bsk->bhk", weights, mine)) < 4e-3
