"""The compiled decoder computes what `Transformer.decode` computes, for every kind of layer, length and way of leaving a batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from model.cache import Cache
from model.config import ModelConfig
from model.decoding import CompiledDecoder, TorchDecoder, decoder_for
from model.packed_weights import PackedWeights
from model.transformer import Transformer
from tiny_models import ODD_SIZES, V4, lively

CONFIG = replace(V4, **ODD_SIZES, index_head_dim=12)
PROMPTS = [200, 3, 1, 100, 20, 127]


def _model(config: ModelConfig = CONFIG, seed: int = 3) -> Transformer:
    return lively(config, seed).requires_grad_(False)


def _filled(model: Transformer, prompts: list[int], *, capacity: int, copies: int = 1) -> list[Cache]:
    caches = [Cache(model.config, rows=len(prompts), capacity=capacity) for _ in range(copies)]
    tokens, cu = torch.randint(model.config.vocab_size, (sum(prompts),)), torch.tensor([0, *prompts]).cumsum(0)
    for cache in caches:
        model.prefill(tokens, cu, cache)
    return caches


def _compare(model: Transformer, prompts: list[int], steps: int) -> None:
    """Decode side by side to the edge of the cache and compare logits at every step."""
    ours, theirs = _filled(model, prompts, capacity=max(prompts) + steps, copies=2)
    compiled, reference = CompiledDecoder(PackedWeights(model), ours), TorchDecoder(model, theirs)
    for _ in range(steps):
        tokens = torch.randint(model.config.vocab_size, (len(prompts),)).tolist()
        expected = reference.step(tokens)
        torch.testing.assert_close(compiled.step(tokens), expected, atol=1e-4 * max(1.0, float(expected.abs().max())), rtol=0)
    assert torch.equal(ours.positions, theirs.positions)
    with pytest.raises(ValueError, match=f"capacity {ours.capacity}"):
        compiled.step([0] * len(prompts))


@pytest.mark.parametrize("seed", range(2))
def test_logits_equal_the_reference_to_the_edge_of_the_cache(seed: int) -> None:
    _compare(_model(seed=seed), PROMPTS, 70)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 1, "compress_ratios": [0, 0], "num_hash_layers": 0},
        {"num_hidden_layers": 1, "compress_ratios": [4, 0], "num_hash_layers": 0},
        {"num_hidden_layers": 1, "compress_ratios": [128, 0], "num_hash_layers": 1},
        {"index_topk": 64},
        {"num_attention_heads": 18, "head_dim": 16, "index_n_heads": 20},
        {"hc_mult": 2, "hc_sinkhorn_iters": 3},
        {"hc_mult": 5},
        {"num_experts_per_tok": 1, "norm_topk_prob": False, "swiglu_limit": 0.5},
        {"num_experts_per_tok": 7},
    ],
    ids=["window", "csa", "hca", "all entries", "many heads", "two streams", "five streams", "one expert, clamped", "every expert"],
)
def test_logits_equal_the_reference_in_every_shape(changes: dict) -> None:
    _compare(_model(replace(CONFIG, **changes)), [140, 2, 33], 12)


def test_logits_of_large_weights_equal_the_reference() -> None:
    model = _model()
    for block in model.layers:
        block.attn.q_norm.weight.mul_(8)
        block.attn.kv_norm.weight.mul_(8)
        block.ffn.gate.weight.mul_(20)
    model.head.weight.mul_(30)
    _compare(model, PROMPTS, 8)


@pytest.mark.parametrize("kind", [CompiledDecoder, TorchDecoder])
def test_rows_leave_and_the_others_go_on(kind: type) -> None:
    model = _model()
    tokens = torch.randint(97, (40, 6))
    whole, parted = _filled(model, PROMPTS, capacity=260, copies=2)
    reference = TorchDecoder(model, whole)
    decoder = CompiledDecoder(PackedWeights(model), parted) if kind is CompiledDecoder else TorchDecoder(model, parted)
    rows = list(range(6))
    for step in range(40):
        if leaving := {5: [0, 1, 2, 4, 5], 9: [0, 2, 3, 4], 30: [3]}.get(step):
            decoder.keep(leaving)
            rows = [rows[i] for i in leaving]
        expected = reference.step(tokens[step].tolist())
        torch.testing.assert_close(decoder.step(tokens[step, rows].tolist()), expected[rows], atol=1e-4, rtol=0)
    assert rows == [5]


def test_a_row_that_left_does_not_run_past_the_cache() -> None:
    model = _model()
    (cache,) = _filled(model, [20, 3, 3, 3, 3, 3, 3, 3, 3], capacity=24)
    decoder = TorchDecoder(model, cache)
    decoder.step([1] * 9)
    decoder.keep(list(range(1, 9)))  # fewer than an eighth: the long one stays in the cache for a while
    for _ in range(20):
        decoder.step([1] * 8)


def test_a_row_has_the_same_bits_in_any_batch() -> None:
    model = _model()
    prompts, tokens = [50 + i % 3 for i in range(21)], torch.randint(97, (6, 21))
    together, alone = _filled(model, prompts, capacity=64, copies=2)
    weights = PackedWeights(model)
    many, some = CompiledDecoder(weights, together), CompiledDecoder(weights, alone)
    some.keep([4, 17, 20])
    for step in tokens:
        assert torch.equal(many.step(step.tolist())[[4, 17, 20]], some.step(step[[4, 17, 20]].tolist()))


def test_quantised_experts_decode_as_they_train() -> None:
    model = _model(replace(CONFIG, hidden_size=64, moe_intermediate_size=32))
    model.quantize(experts=True)
    _compare(model, [30, 5], 6)


def test_new_weights_need_a_new_decoder_and_old_ones_are_left_alone() -> None:
    model = _model()
    (cache,) = _filled(model, [9, 4], capacity=20)
    before = [p.clone() for p in model.parameters()]
    copy = cache.select(torch.arange(2))
    first = decoder_for(model)(cache).step([3, 5]).clone()
    assert all(map(torch.equal, before, model.parameters()))
    model.head.weight.mul_(2)
    torch.testing.assert_close(decoder_for(model)(copy).step([3, 5]), 2 * first)


def test_what_runs_where_is_decided_by_the_model() -> None:
    model = _model()
    (cache,) = _filled(model, [3], capacity=8)
    assert isinstance(decoder_for(model)(cache), CompiledDecoder)
    half = Cache(CONFIG, rows=1, capacity=8, dtype=torch.bfloat16)
    assert isinstance(decoder_for(_model().to(torch.bfloat16))(half), TorchDecoder)
    assert isinstance(decoder_for(_model(replace(CONFIG, head_dim=24)))(cache), TorchDecoder)


@pytest.mark.parametrize("kind", [CompiledDecoder, TorchDecoder])
def test_wrong_tokens_are_refused(kind: type) -> None:
    model = _model()
    (cache,) = _filled(model, [3, 4], capacity=8)
    decoder = CompiledDecoder(PackedWeights(model), cache) if kind is CompiledDecoder else TorchDecoder(model, cache)
    with pytest.raises(ValueError, match="got 3 tokens, expected one for each of 2 rows"):
        decoder.step([1, 2, 3])
    if kind is CompiledDecoder:
        with pytest.raises(ValueError, match="got tokens -1 to 97, expected 0 to 96"):
            decoder.step([-1, 97])


def test_a_broken_model_gives_nan_and_stays_within_its_memory() -> None:
    model = _model()
    model.layers[1].attn.wq_a.weight.fill_(float("nan"))
    (cache,) = _filled(model, [100, 4], capacity=120)
    decoder = CompiledDecoder(PackedWeights(model), cache)
    for _ in range(20):
        assert decoder.step([3, 4]).isnan().all()
