"""The kernels between the products of a decoding step equal their references, and the whole step equals `Transformer.decode`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.cache import Cache
from model.config import ModelConfig
from model.kernels import choice
from model.kernels.experts.reference import routed_experts as plain_experts
from model.kernels.static_decode import fused, fused_experts, reference
from model.kernels.static_decode.rows import Pool, Rows
from model.static_step import StaticStep
from model.transformer import Transformer


def rows_of(positions: list[int], pairs: int = 4) -> Rows:
    """Put rows somewhere, with random rotations."""
    angles = torch.rand(300, pairs) * 6
    return Rows(torch.tensor(positions), torch.stack([angles.cos(), angles.sin()], -1), 1e-6)


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, atol=2e-6, rtol=2e-5)


def test_put_window() -> None:
    wide, weight, rows = torch.randn(4, 50), torch.randn(12), rows_of([0, 15, 16, 130])
    keys = torch.randn(4, 30, 12)
    mine, theirs = keys.clone(), keys.clone()
    fused.put_window(wide[:, 9:21], weight, mine, rows, window=16)
    reference.put_window(wide[:, 9:21], weight, theirs, rows, window=16)
    close(mine, theirs)
    assert int((mine != keys).any(2).sum()) == 4


@pytest.mark.parametrize(("ratio", "pairs"), [(4, 16), (128, 16), (128, 4), (128, 2)], ids=str)
def test_compress(ratio: int, pairs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every place in a block and in the ring, beginning with rows that have no block before; six pairs of channels at once and in parts."""
    monkeypatch.setattr(fused, "LONG", {"TOKENS": 32, "PAIRS": pairs})
    width, channels, ring = 12, 24 if ratio == 4 else 12, 8 if ratio == 4 else 128
    rows = rows_of([0, 1, 2, 3, 4, 6, 7, 8, 11, 126, 127, 128, 255])
    count = len(rows.positions)
    seen = torch.arange(ring) < rows.positions[:, None]
    gates = torch.randn(count, ring, channels).masked_fill_(~seen[:, :, None], float("-inf"))
    kvs, entries, wide = torch.randn(count, ring, channels), torch.randn(count, 80, width), torch.randn(count, 70)
    pools = [Pool(ratio, torch.randn(0), torch.randn(0), kvs.clone(), gates.clone(), entries.clone()) for _ in range(2)]
    ape, weight = torch.randn(ratio, channels), torch.randn(width)
    mine, theirs = (pool._replace(ape=ape, weight=weight) for pool in pools)
    kv, gate = wide[:, 3 : 3 + channels], wide[:, 40 : 40 + channels]
    fused.compress(kv, gate, mine, rows)
    reference.compress(kv, gate, theirs, rows)
    for got, expected in zip((mine.kv, mine.gate, mine.entries), (theirs.kv, theirs.gate, theirs.entries), strict=True):
        close(got, expected)
    assert int((mine.entries != entries).any(2).sum()) == int(((rows.positions + 1) % ratio == 0).sum())


@pytest.mark.parametrize("chosen", [None, 6])
@pytest.mark.parametrize("ratio", [0, 4])
def test_list_keys(ratio: int, chosen: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "LIST", 32)
    positions, keys = torch.tensor([0, 3, 14, 15, 16, 100]), torch.empty(6, 1 + 16 + (25 if ratio else 0), 1)
    numbers = None
    if chosen and ratio:
        numbers = torch.stack([torch.randperm(25)[:6] for _ in range(6)]).int(), torch.tensor([0, 1, 3, 4, 4, 6]).int()
    mine, count = fused.list_keys(positions, keys, window=16, ratio=ratio, chosen=numbers)
    theirs, expected = reference.list_keys(positions, keys, window=16, ratio=ratio, chosen=numbers)
    assert count.tolist() == expected.tolist() and mine.shape == theirs.shape
    for i, length in enumerate(count.tolist()):
        assert mine[i, :length].tolist() == theirs[i, :length].tolist()


@pytest.mark.parametrize(("tokens", "experts"), [(1, 3), (37, 5), (90, 40)], ids=str)
def test_group(tokens: int, experts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_experts, "PAIRS", {"BLOCK": 32, "num_warps": 1})
    indices = torch.rand(tokens, experts - 1).topk(2).indices  # the last expert gets nothing
    order, slots, ends = fused_experts.grouped(indices, experts)
    chosen, right = torch.sort(indices.flatten(), stable=True)
    assert torch.equal(order, right) and torch.equal(slots[order], torch.arange(2 * tokens))
    assert ends.tolist() == torch.searchsorted(chosen, torch.arange(experts), right=True).tolist()


def test_group_gives_every_pair_a_place_whatever_the_router_says() -> None:
    order, slots, ends = fused_experts.grouped(torch.tensor([[0, 7], [2, 5], [7, 1]]), 5)
    assert order.tolist() == [0, 5, 2, 1, 3, 4] and slots[order].tolist() == list(range(6)) and ends.tolist() == [1, 2, 3, 3, 6]


@pytest.mark.parametrize("rows", [16, 32])
@pytest.mark.parametrize(("tokens", "experts", "active"), [(1, 3, 2), (37, 6, 2), (50, 4, 1)], ids=str)
def test_experts(tokens: int, experts: int, active: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tile = {"ROWS": rows, "COLUMNS": 16, "BLOCK": 16, "STAGES": 1, "num_warps": 1}
    monkeypatch.setattr(fused_experts, "_tiles", lambda each: (tile, tile))
    x, shares = torch.randn(tokens, 20), torch.rand(tokens, active)
    matrices = torch.randn(experts, 24, 20), torch.randn(experts, 20, 24), torch.randn(experts, 24, 20)
    indices = torch.rand(tokens, experts - 1).topk(active).indices  # the last expert gets nothing
    got = fused_experts.experts(x, indices, shares, matrices, limit=2.0)
    torch.testing.assert_close(got, plain_experts(x, indices, shares, matrices, limit=2.0), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("words", [1, 5, 64, 700])
def test_choose(words: int, temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "WORDS", {"BLOCK": 64, "num_warps": 1})
    logits, draws, heat = torch.randn(60, words) * 4, torch.rand(60), torch.tensor([temperature])
    logits[0] = -1e30
    logits[0, words // 2] = 0  # a token of all the probability
    draws[0] = 1 - 2**-24
    results = []
    for choose in (fused.choose, reference.choose):
        tokens, logprobs = torch.empty(60, dtype=torch.int32), torch.empty(60)
        choose(logits, draws, heat, tokens, logprobs)
        results += [tokens, logprobs]
    assert torch.equal(results[0], results[2])
    torch.testing.assert_close(results[1], results[3], atol=1e-5, rtol=0)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_choose_names_a_token_whatever_the_logits_are(temperature: float) -> None:
    logits, tokens = torch.full((2, 9), float("nan")), torch.full((2,), -1, dtype=torch.int32)
    logits[1, :4] = 1.0
    fused.choose(logits, torch.tensor([0.5, 0.9]), torch.tensor([temperature]), tokens, torch.empty(2))
    assert all(0 <= token < 9 for token in tokens.tolist())


def test_a_whole_step_of_rows_at_all_kinds_of_positions() -> None:
    config = ModelConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, head_dim=16, qk_rope_head_dim=8, q_lora_rank=24,
        o_groups=2, o_lora_rank=20, sliding_window=16, compress_ratios=[0, 4, 128, 0], index_n_heads=5, index_head_dim=16, index_topk=6,
        n_routed_experts=7, num_experts_per_tok=3, moe_intermediate_size=28, num_hash_layers=1, initializer_range=0.2,
    )  # fmt: skip
    prompts = [200, 3, 1, 100, 20, 126]
    choice.choose("reference")
    model = Transformer(config).requires_grad_(False)
    cache, step = Cache(config, rows=6, capacity=256), StaticStep(model, rows=6, capacity=256)
    model.prefill(torch.randint(97, (sum(prompts),)), torch.tensor([0, *prompts]).cumsum(0), cache)
    step.load(cache, torch.arange(6))
    for _ in range(5):
        tokens = torch.randint(97, (6,))
        step.forced.copy_(tokens)
        choice.choose("triton")
        step.run(6)
        choice.choose("reference")
        torch.testing.assert_close(step.logits, model.head(model.decode(tokens, cache)), atol=1e-5, rtol=0)
