"""The static decoding step computes what `Transformer.decode` computes, and the decoder around it keeps count of its rows."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from model.cache import Cache
from model.config import ModelConfig
from model.graph_decoding import GraphDecoder, hindrance
from model.static_step import StaticStep
from model.transformer import Transformer
from tiny_models import ODD_SIZES, V4, V32, lively

CONFIG = replace(V4, **ODD_SIZES)
PROMPTS = [200, 3, 1, 100, 20, 127]


def _model(config: ModelConfig = CONFIG, seed: int = 3) -> Transformer:
    return lively(config, seed).requires_grad_(False).eval()


def _filled(model: Transformer, prompts: list[int], *, capacity: int) -> Cache:
    torch.manual_seed(len(prompts))
    weight = model.embed.weight
    cache = Cache(model.config, rows=len(prompts), capacity=capacity, device=weight.device, dtype=weight.dtype)
    tokens = torch.randint(model.config.vocab_size, (sum(prompts),), device=weight.device)
    model.prefill(tokens, torch.tensor([0, *prompts], device=weight.device).cumsum(0), cache)
    return cache


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"index_topk": 64},
        {"num_hidden_layers": 1, "compress_ratios": [0, 0], "num_hash_layers": 0},
        {"num_hidden_layers": 1, "compress_ratios": [128, 0], "num_hash_layers": 1},
        {"hc_mult": 2, "num_experts_per_tok": 1, "norm_topk_prob": False, "swiglu_limit": 0.5},
        {"num_experts_per_tok": 7},
    ],
    ids=["all kinds", "all entries", "window", "hca", "two streams, one expert, clamped", "every expert"],
)
def test_logits_equal_those_of_decode_to_the_edge_of_the_cache(changes: dict) -> None:
    model = _model(replace(CONFIG, **changes))
    cache = _filled(model, PROMPTS, capacity=340)
    step = StaticStep(model, rows=9, capacity=340)
    for tensor in (layer.keys for layer in step.cache.layers):
        tensor.fill_(float("nan"))  # what no row has written is never read
    step.load(cache, torch.arange(6))
    for _ in range(140):
        tokens = torch.randint(97, (6,))
        step.forced[:6] = tokens.int()
        step.run(6)
        expected = model.head(model.decode(tokens, cache))
        torch.testing.assert_close(step.logits[:6], expected, atol=2e-5 * max(1.0, float(expected.abs().max())), rtol=0)
    assert torch.equal(step.cache.positions[:6], cache.positions)


def test_a_row_that_is_not_dropped_in_time_stays_within_its_memory() -> None:
    model = _model()
    step = StaticStep(model, rows=2, capacity=128)
    step.load(_filled(model, [126, 5], capacity=128), torch.arange(2))
    beyond = [layer.keys[1].clone() for layer in step.cache.layers]
    for _ in range(5):
        step.run(1)
    assert step.cache.positions.tolist() == [127, 5]
    assert all(torch.equal(layer.keys[1], before) for layer, before in zip(step.cache.layers, beyond))


def test_quantised_experts_decode_as_they_train() -> None:
    model = _model(replace(CONFIG, hidden_size=64, moe_intermediate_size=32))
    model.quantize(experts=True)
    cache, step = _filled(model, [30, 5], capacity=40), StaticStep(model, rows=2, capacity=40)
    step.load(cache, torch.arange(2))
    step.run(2)
    torch.testing.assert_close(step.logits, model.head(model.decode(torch.zeros(2, dtype=torch.int64), cache)), atol=1e-4, rtol=0)


def _alone(model: Transformer, prompt: int, forced: list[int], draws: list[float], temperature: float) -> list[int]:
    """Choose one row's tokens from `Transformer.decode`, -1 feeding the chosen one."""
    cache, tokens, chosen = _filled(model, [prompt], capacity=200), [], 0
    for token, draw in zip(forced, draws, strict=True):
        logits = model.head(model.decode(torch.tensor([chosen if token < 0 else token]), cache))[0]
        p = torch.softmax((logits if temperature == 0 else logits / temperature).double(), -1)
        chosen = int(p.argmax() if temperature == 0 else torch.searchsorted(p.cumsum(0), draw, right=True))
        tokens.append(chosen)
    return tokens


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_rows_leave_while_a_step_is_running(temperature: float) -> None:
    model = _model()
    decoder = GraphDecoder(model)
    rng = np.random.default_rng(1)
    forced = np.where(rng.random((30, 1)) < 0.3, rng.integers(0, 97, (30, 1)), -1).repeat(40, 1).astype(np.int32)
    forced[0] = 3
    draws = rng.random((30, 1), dtype=np.float32).repeat(40, 1)
    cache = _filled(model, [11], capacity=200)
    decoder.start(cache, torch.zeros(40, dtype=torch.int64), temperature=temperature)
    expected = _alone(model, 11, forced[:, 0].tolist(), draws[:, 0].tolist(), temperature)
    alive = 40
    decoder.launch(forced[0], draws[0])
    for number in range(30):
        if number < 29:
            decoder.launch(forced[number + 1, :alive], draws[number + 1, :alive])
        tokens, logprobs = decoder.collect()
        assert tokens.tolist() == [expected[number]] * alive
        assert np.isfinite(logprobs).all() and (logprobs <= 0).all()
        if number in (7, 20):
            index = np.arange(alive)[:: 2 if number == 7 else 3]
            assert decoder.shrinks(len(index), steps=100) and not decoder.shrinks(len(index), steps=1)
            assert not decoder.shrinks(alive, steps=100)
            decoder.keep(index)
            alive = len(index)


def test_first_choices_made_elsewhere_are_collected_and_fed() -> None:
    model = _model()
    decoder, first = GraphDecoder(model), torch.tensor([7, 90])
    decoder.start(_filled(model, [9, 4], capacity=20), torch.arange(2), temperature=0.0)
    decoder.enter(first, torch.tensor([-0.5, -2.0]))
    decoder.launch(np.array([-1, 3], np.int32), np.zeros(2, np.float32))
    tokens, logprobs = decoder.collect()
    assert tokens.tolist() == first.tolist() and logprobs.tolist() == [-0.5, -2.0]
    expected = model.head(model.decode(torch.tensor([7, 3]), _filled(model, [9, 4], capacity=20)))
    assert decoder.collect()[0].tolist() == expected.argmax(1).tolist()


def test_new_weights_are_read_and_moved_ones_noticed() -> None:
    model = _model()

    def logits() -> torch.Tensor:
        decoder.start(_filled(model, [9, 4], capacity=20), torch.arange(2), temperature=1.0)
        decoder.launch(np.array([3, 5], np.int32), np.zeros(2, np.float32))
        decoder.collect()
        assert decoder._step is not None
        return decoder._step.logits[:2].clone()

    def direct() -> torch.Tensor:
        return model.head(model.decode(torch.tensor([3, 5]), _filled(model, [9, 4], capacity=20)))

    decoder = GraphDecoder(model)
    torch.testing.assert_close(logits(), direct(), atol=1e-4, rtol=0)
    for parameter in model.parameters():
        parameter.mul_(1.1)  # in place, as an optimizer does
    torch.testing.assert_close(logits(), direct(), atol=1e-4, rtol=0)
    step = decoder._step
    model.load_state_dict(_model(seed=4).state_dict())  # into the same memory, as a checkpoint is
    torch.testing.assert_close(logits(), direct(), atol=1e-4, rtol=0)
    assert decoder._step is step
    for parameter in model.parameters():
        parameter.data = parameter.data * 0.9
    torch.testing.assert_close(logits(), direct(), atol=1e-4, rtol=0)
    assert decoder._step is not step


def test_a_model_that_is_quantised_later_keeps_its_weights() -> None:
    model = _model(replace(CONFIG, hidden_size=64, moe_intermediate_size=32))
    decoder, before = GraphDecoder(model), model.layers[1].ffn.experts.w1.clone()
    for quantised in (False, True, False):
        model.quantize(experts=quantised)
        decoder.start(_filled(model, [9, 4], capacity=20), torch.arange(2), temperature=1.0)
        decoder.launch(np.array([3, 5], np.int32), np.zeros(2, np.float32))
        decoder.collect()
        assert decoder._step is not None and torch.equal(model.layers[1].ffn.experts.w1, before)
        expected = model.head(model.decode(torch.tensor([3, 5]), _filled(model, [9, 4], capacity=20)))
        torch.testing.assert_close(decoder._step.logits[:2], expected, atol=1e-4, rtol=0)


def test_calls_of_all_sizes_share_one_decoder() -> None:
    """One row, more rows than there are buffers, longer ones, and small again; steps that nobody collected do not matter."""
    model = _model()
    decoder, sizes = GraphDecoder(model), []
    for rows, capacity in [(1, 30), (20, 30), (3, 200), (1, 90), (70, 25), (5, 2000), (70, 25), (2, 100)]:
        prompts = [1 + 7 * i % 19 for i in range(rows)]
        decoder.start(_filled(model, prompts, capacity=capacity), torch.arange(rows), temperature=0.0)
        cache = _filled(model, prompts, capacity=capacity)
        tokens, chosen = torch.arange(rows) % 97, []
        for _ in range(2):
            decoder.launch(tokens.numpy().astype(np.int32), np.zeros(rows, np.float32))
            expected = model.head(model.decode(tokens, cache))
            assert decoder._step is not None
            torch.testing.assert_close(decoder._step.logits[:rows], expected, atol=1e-4, rtol=0)
            chosen.append(expected.argmax(1).tolist())
        assert decoder.collect()[0].tolist() == chosen[0]
        sizes.append((decoder._step.rows, decoder._step.capacity))
    assert sizes == [(16, 128), (32, 128), (32, 256), (32, 256), (128, 128), (16, 2048), (128, 128), (128, 128)]


@pytest.mark.parametrize(
    ("model", "part"),
    [
        (_model, "not on a GPU"),
        (lambda: _model(replace(CONFIG, head_dim=24)), "no V4 with"),
        (lambda: _model(replace(CONFIG, hc_mult=2)), "no V4 with"),
        (lambda: Transformer(V32), "no V4 with"),
        (lambda: _quantised(_model(), kv=True), "quantised"),
        (lambda: _quantised(_model(), indexer=True), "quantised"),
        (lambda: _quantised(_model(replace(CONFIG, hidden_size=64)), experts=True), "not on a GPU"),
    ],
    ids=["on a CPU", "width", "streams", "V3.2", "keys", "index", "experts"],
)
def test_what_hinders_a_graph_is_named(model: Callable[[], Transformer], part: str) -> None:
    assert part in hindrance(model())


def _quantised(model: Transformer, **what: bool) -> Transformer:
    model.quantize(**what)
    return model


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


WIDE = replace(
    CONFIG, hidden_size=256, head_dim=64, qk_rope_head_dim=32, q_lora_rank=128, o_lora_rank=64, moe_intermediate_size=128,
    n_routed_experts=8, index_n_heads=16, index_head_dim=64, num_attention_heads=16, initializer_range=0.05,
)  # fmt: skip


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize(("rows", "experts"), [(6, False), (40, False), (40, True)], ids=str)
def test_a_graph_gives_what_decode_gives(rows: int, experts: bool) -> None:
    """In fp32, for tiles of few rows and of many, with experts as they are and in FP4."""
    model, prompts = _model(WIDE).cuda(), [*PROMPTS, *range(1, 35)][:rows]
    model.quantize(experts=experts)
    cache, decoder = _filled(model, prompts, capacity=240), GraphDecoder(model)
    assert not hindrance(model)
    decoder.start(cache, torch.arange(rows, device="cuda"), temperature=1.0)
    for _ in range(9):
        tokens = torch.randint(97, (rows,), device="cuda")
        decoder.launch(tokens.cpu().numpy().astype(np.int32), np.full(rows, 0.5, np.float32))
        chosen, logprobs = decoder.collect()
        assert decoder._step is not None
        mine, expected = decoder._step.logits[:rows], model.head(model.decode(tokens, cache))
        torch.testing.assert_close(mine, expected, atol=1e-4 * float(expected.abs().max()), rtol=0)
        stated = torch.log_softmax(mine, -1).gather(1, torch.from_numpy(chosen).cuda().long()[:, None])[:, 0]
        torch.testing.assert_close(torch.from_numpy(logprobs).cuda(), stated, atol=1e-4, rtol=0)


@pytest.mark.gpu
@gpu
def test_from_a_prefill_to_the_first_step_nothing_waits_for_the_gpu() -> None:
    model, rows = _model(WIDE).cuda().bfloat16(), 2 * len(PROMPTS)
    tokens, cu = torch.randint(97, (sum(PROMPTS),), device="cuda"), torch.tensor([0, *PROMPTS]).cumsum(0)
    decoder, source = GraphDecoder(model), torch.arange(rows, device="cuda") // 2
    for waiting in ("default", "error"):  # the first time kernels are compiled and a graph is captured
        torch.cuda.set_sync_debug_mode(waiting)
        try:
            cache = Cache(WIDE, rows=len(PROMPTS), capacity=240, device="cuda", dtype=torch.bfloat16)
            logits = model.head(model.prefill(tokens, cu, cache))[source]
            decoder.start(cache, source, temperature=1.0)
            decoder.enter(logits.argmax(1), logits.amax(1))
            decoder.launch(np.full(rows, -1, np.int32), np.full(rows, 0.5, np.float32))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert decoder.collect()[0].tolist() == logits.argmax(1).tolist()
        decoder.collect()


@pytest.mark.gpu
@gpu
def test_a_graph_in_bf16_errs_no_more_than_decode() -> None:
    model = _model(WIDE).cuda()
    half = copy.deepcopy(model).bfloat16()
    cache, exact = _filled(half, PROMPTS, capacity=240), _filled(model, PROMPTS, capacity=240)
    decoder = GraphDecoder(half)
    decoder.start(cache, torch.arange(6, device="cuda"), temperature=1.0)
    mine, plain = [], []
    for _ in range(12):
        tokens = torch.randint(97, (6,), device="cuda")
        decoder.launch(tokens.cpu().numpy().astype(np.int32), np.full(6, 0.5, np.float32))
        decoder.collect()
        assert decoder._step is not None
        right = model.head(model.decode(tokens, exact))
        mine.append(float((decoder._step.logits[:6] - right).norm() / right.norm()))
        plain.append(float((half.head(half.decode(tokens, cache)) - right).norm() / right.norm()))
    assert np.mean(mine) <= 1.5 * np.mean(plain), (np.mean(mine), np.mean(plain))
