"""The indexer's Triton kernels against a dense score and a stable sort."""

import pytest
import torch

from model.config import ModelConfig
from model.kernels.choice import choose
from model.kernels.indexer import fused, fused_listed
from model.kernels.indexer.kernel import select_rows
from model.kernels.indexer.listed import select_entries
from model.kernels.indexer.op import select
from model.layout import PackedRow

CONFIG = ModelConfig(
    num_hidden_layers=2, compress_ratios=[4, 128], num_nextn_predict_layers=0, head_dim=16, qk_rope_head_dim=8, sliding_window=24
)


@pytest.fixture(autouse=True)
def triton_and_small_tiles(monkeypatch):
    """Run the kernels, with tiles that short rows have several of."""
    choose("triton")
    monkeypatch.setattr(fused, "TILE", fused.TILE | {"KEYS": 16})
    monkeypatch.setattr(fused, "PRODUCT_COLUMNS", 16)


@pytest.mark.parametrize("scores", [1 << 24, 100], ids=["one_chunk", "many_chunks"])
@pytest.mark.parametrize("lengths", [[1], [3], [20], [150], [70, 3, 1, 101, 4]], ids=str)
def test_select(lengths, scores, monkeypatch):
    monkeypatch.setattr(fused, "SCORES", scores)
    torch.manual_seed(sum(lengths))
    total = sum(lengths)
    row = PackedRow(CONFIG, torch.tensor([0, *lengths]).cumsum(0), total)
    entries = row.entries[4]
    count_keys = len(entries.first)
    q, weights, keys = torch.randn(total, 8, 16), torch.randn(total, 8), torch.randn(count_keys, 16)
    got = select(q, keys, weights, row=row, ratio=4, count=6)
    assert got.shape == (total, min(6, entries.width))
    dense = torch.einsum("th,thc->tc", weights, torch.einsum("thk,ck->thc", q, keys).relu())
    for token in range(total):
        low, seen = int(entries.base[token]), int(entries.visible[token])
        order = torch.sort(dense[token, low : low + seen] + 0.0, descending=True, stable=True).indices
        best = order[: min(6, seen)].sort().values.tolist()
        assert got[token].tolist() == best + [-1] * (got.shape[1] - len(best))


@pytest.mark.parametrize(("heads", "width"), [(5, 16), (8, 24), (8, 8)], ids=str)
def test_select_refuses_heads_that_are_no_tiles(heads, width):
    row = PackedRow(CONFIG, torch.tensor([0, 9]), 9)
    with pytest.raises(ValueError, match=f"got {heads} heads of {width} channels"):
        select(torch.zeros(9, heads, width), torch.zeros(2, width), torch.zeros(9, heads), row=row, ratio=4, count=1)


def test_select_with_fp8_inputs_and_scaled_keys():
    torch.manual_seed(9)
    lengths = [70, 3, 101]
    row = PackedRow(CONFIG, torch.tensor([0, *lengths]).cumsum(0), sum(lengths))
    q, keys = torch.randn(row.length, 8, 16), torch.randn(len(row.entries[4].first), 16)
    q, keys = q.to(torch.float8_e4m3fn), keys.to(torch.float8_e4m3fn)
    weights, key_scale = torch.randn(row.length, 8), torch.rand(len(keys)) + 0.1
    got = select(q, keys, weights, row=row, ratio=4, count=6, key_scale=key_scale)
    choose("reference")
    plain = select(q.float(), keys.float() * key_scale[:, None], weights, row=row, ratio=4, count=6)
    assert torch.equal(got.sort(1).values, plain.sort(1).values)
    assert torch.equal(select(q, keys, weights, row=row, ratio=4, count=6, key_scale=key_scale).sort(1).values, plain.sort(1).values)


def chosen(scores, wanted):
    """Run the selection alone on rows of scores, all of them visible."""
    rows, width = scores.shape
    out = torch.full((rows, wanted), -7)
    zeros, seen = torch.zeros(rows, dtype=torch.int64), torch.full((rows,), width)
    select_rows[(rows,)](scores, zeros, seen, out, 0, width, wanted, QUERIES=1, BLOCK=1 << (width - 1).bit_length())
    return out


@pytest.mark.parametrize("values", ["floats", "few", "zeros", "huge", "negative"])
def test_selection_is_exact_and_breaks_ties_to_the_lower_number(values):
    torch.manual_seed(4)
    scores = torch.randn(5, 200)
    scores = {
        "floats": scores,
        "few": scores.round(),
        "zeros": torch.where(scores > 0, 0.0, -0.0),
        "huge": scores * 3e38,
        "negative": -scores.abs() * 1e-40,
    }[values]
    scores = scores.clamp(-3e38, 3e38)
    order = torch.sort(scores + 0.0, dim=1, descending=True, stable=True).indices[:, :37].sort(1).values
    assert torch.equal(chosen(scores, 37), order)


@pytest.mark.parametrize(("entries", "k"), [(1, 3), (40, 6), (130, 20), (700, 37), (900, 3), (2000, 20)], ids=str)
def test_entries_of_single_queries(entries, k, monkeypatch):
    monkeypatch.setattr(fused_listed, "TILE", fused_listed.TILE | {"KEYS": 16})
    monkeypatch.setattr(fused_listed, "PROGRAMS", 20)
    monkeypatch.setattr(fused_listed, "SPAN", 64)
    monkeypatch.setattr(fused_listed, "FIRST_SPAN", 128)
    torch.manual_seed(entries)
    q, weights = torch.randn(4, 3, 24), torch.randn(4, 3)
    keys = torch.randn(4, entries + 5, 24)[:, :entries].round()
    count = torch.tensor([entries, entries // 2, 0, min(entries, k)], dtype=torch.int32)
    q[0] = q[0].round()
    weights[0] = weights[0].round()  # many ties
    for row, seen in enumerate(count.tolist()):
        keys[row, seen:] = float("nan")
    rows, number = select_entries(q, keys, weights, count, k)
    assert rows.shape == (4, k) and rows.dtype == number.dtype == torch.int32
    assert number.tolist() == [min(k, seen) for seen in count.tolist()]
    for row, seen in enumerate(count.tolist()):
        scores = torch.einsum("h,hc->c", weights[row], (q[row] @ keys[row, :seen].T).relu())
        best = torch.sort(scores + 0.0, descending=True, stable=True).indices[:k].sort().values.tolist()
        assert rows[row].tolist() == best + [-1] * (k - len(best))
    choose("reference")
    plain, counted = select_entries(q, keys.nan_to_num(), weights, count, k)
    assert torch.equal(counted, number) and torch.equal(plain.sort(1).values, rows.sort(1).values)
