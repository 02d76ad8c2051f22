"""The analytic counts against torch's FLOP counter and the real cache, on small models; every difference is accounted for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from model.cache import FRONT, Cache
from model.config import AnyConfig, ModelConfig, V32Config
from model.efficiency import GROUPS, PRECISIONS, cache, flops_by_group, flops_per_token, kv_bytes, parameters, parts, state_bytes
from model.transformer import Transformer

V4 = ModelConfig(
    vocab_size=48,
    hidden_size=40,
    num_hidden_layers=5,
    num_attention_heads=4,
    head_dim=24,
    qk_rope_head_dim=8,
    q_lora_rank=20,
    o_groups=2,
    o_lora_rank=12,
    sliding_window=16,
    compress_ratios=[0, 4, 128, 4, 128, 0],
    index_n_heads=6,
    index_head_dim=16,
    index_topk=8,
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=28,
    num_hash_layers=5,
    hc_mult=3,
)
V32 = V32Config(
    vocab_size=48,
    hidden_size=40,
    intermediate_size=36,
    num_hidden_layers=3,
    first_k_dense_replace=1,
    num_attention_heads=4,
    q_lora_rank=20,
    kv_lora_rank=24,
    qk_nope_head_dim=12,
    qk_rope_head_dim=8,
    v_head_dim=10,
    index_n_heads=6,
    index_head_dim=16,
    index_topk=32,
    n_routed_experts=2,  # all are chosen, so no padding of the experts' rows is counted; V4 above chooses 2 of 4
    num_experts_per_tok=2,
    n_group=1,
    topk_group=1,
    moe_intermediate_size=28,
    num_nextn_predict_layers=0,
)
ROWS = 16
"""Sequences decoded at once: V4's hash tables below give each of 4 experts 8 of their 32 choices, which no implementation has to pad."""


def _model(config: AnyConfig) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(config)
    for block in model.layers:
        if (gate := getattr(block.ffn, "gate", None)) is not None and gate.tid2eid is not None:
            token = torch.arange(config.vocab_size)
            gate.tid2eid.copy_(torch.stack([token % 2, 2 + token % 2], 1))
    return model


def _counted(config: AnyConfig, length: int) -> float:
    """Count the FLOPs of one token decoded at a context length, the head included."""
    model, past = _model(config), length - 1
    state = Cache(config, rows=ROWS, capacity=length)
    tokens = torch.arange(ROWS).repeat_interleave(past)
    model.prefill(tokens, torch.arange(ROWS + 1) * past, state)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.head(model.decode(torch.arange(ROWS), state))
    return counter.get_total_flops() / ROWS


def _raw(config: AnyConfig, length: int) -> int:
    return sum(part.flops for part in parts(config, length))


def _v4_differences(config: ModelConfig, length: int) -> int:
    """Multiply-adds that decoding on a CPU makes beside those of the analytic count, or leaves out, or makes element by element."""
    ratios = config.compress_ratios[: config.num_hidden_layers]
    layers, csa, entries = len(ratios), ratios.count(4), length // 4
    key = 2 * config.num_attention_heads * config.head_dim  # one key more for all heads: its score, its share of the value
    extra = layers * key * FRONT  # the sink is a column of its own
    extra += layers * key * (config.sliding_window - min(length, config.sliding_window))  # the ring's empty places are masked
    wide = config.index_n_heads * config.index_head_dim
    if entries > config.index_topk:
        extra += csa * key * (entries - config.index_topk)  # what was not selected is masked, not left out
        extra += csa * entries * config.index_n_heads  # the weighted sum of the heads' scores is a product here
    else:
        # Every entry is visible: nothing is scored.
        extra -= csa * (config.q_lora_rank * wide + config.hidden_size * config.index_n_heads + entries * wide)
    extra -= 2 * layers * config.hc_mult * config.hidden_size  # a sub-layer's output goes into the streams element by element
    return extra - config.hc_mult * config.hidden_size  # and so does the last merge


def _v32_differences(config: V32Config, length: int) -> int:
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    width = config.kv_lora_rank + config.qk_rope_head_dim
    extra = layers * heads * config.qk_rope_head_dim * length  # the rotated dimensions are summed as if they were values
    if length > config.index_topk:
        extra += layers * heads * (2 * width - config.qk_rope_head_dim) * (length - config.index_topk)
        return extra + layers * length * config.index_n_heads
    wide = config.index_n_heads * config.index_head_dim
    return extra - layers * (config.q_lora_rank * wide + config.hidden_size * config.index_n_heads + length * wide)


@pytest.mark.parametrize("length", [7, 16, 30, 128, 131, 259], ids="{} tokens".format)
@pytest.mark.parametrize(
    "config",
    [
        V4,
        replace(V4, compress_ratios=[0, 0, 0, 0, 0, 0]),
        replace(V4, compress_ratios=[4, 4, 4, 4, 4, 0], index_topk=500),
        replace(V4, compress_ratios=[128, 128, 128, 128, 128, 0], hc_mult=4, n_routed_experts=2),
    ],
    ids=["all kinds of layers", "windows only", "CSA without selection", "HCA, every expert"],
)
def test_v4_flops_are_those_that_torch_counts(config, length):
    if config.n_routed_experts == 2:
        config = replace(config, num_hash_layers=0)
    assert _counted(config, length) == _raw(config, length) + 2 * _v4_differences(config, length)


@pytest.mark.parametrize("length", [7, 32, 33, 130], ids="{} tokens".format)
def test_v32_flops_are_those_that_torch_counts(length):
    assert _counted(V32, length) == _raw(V32, length) + 2 * _v32_differences(V32, length)


@pytest.mark.parametrize("length", [1, 4, 128, 131, 300], ids="{} tokens".format)
@pytest.mark.parametrize("config", [V4, V32], ids=["V4", "V3.2"])
def test_cached_numbers_are_those_of_the_real_cache(config, length):
    layers = Cache(config, rows=1, capacity=length, dtype=torch.float32).layers
    keys = [tensor for layer in layers for tensor in (layer.keys, layer.index_keys) if tensor is not None]
    states = [
        tensor for layer in layers for state in (layer.compressor, layer.indexer) if state is not None for tensor in (state.kv, state.gate)
    ]
    front = sum(FRONT * layer.keys.shape[-1] for layer in layers)  # the sink's column
    assert sum(key.numel() for key in keys) - front == sum(kind.vectors * kind.width for kind in cache(config, length))
    assert sum(state.numel() * state.itemsize for state in states) == state_bytes(config)


@pytest.mark.parametrize("config", [V4, replace(V4, num_hash_layers=0, hc_mult=4), V32], ids=["V4", "V4, scored", "V3.2"])
def test_parameters_are_those_of_the_real_model(config):
    held = {name: p.numel() for name, p in _model(config).named_parameters() if not name.startswith("mtp.")}
    mixing = sum(size for name, size in held.items() if "hc_" in name)
    idle = sum(size for name, size in held.items() if ".experts." in name) * (1 - config.num_experts_per_tok / config.n_routed_experts)
    found = parameters(config)
    assert found.hyper_connections == mixing
    assert found.total == sum(held.values()) - mixing
    assert found.active == found.total - held["embed.weight"] - idle


@pytest.mark.parametrize("config", [V4, V32], ids=["V4", "V3.2"])
def test_groups_cover_the_flops_and_precisions_weigh_them(config):
    found = parts(config, 200)
    assert {part.group for part in found} <= set(GROUPS) and {part.precision for part in found} <= PRECISIONS.keys()
    assert sum(flops_by_group(config, 200).values()) == pytest.approx(flops_per_token(config, 200))
    assert flops_per_token(config, 200) == pytest.approx(sum(2 * part.macs * PRECISIONS[part.precision] for part in found))


def test_released_bytes_of_a_vector():
    main = {kind.name: kind.bytes_each for kind in cache(replace(V4, head_dim=512, qk_rope_head_dim=64, index_head_dim=128), 128)}
    assert main == {"window": 584, "CSA entries": 584, "HCA entries": 584, "index keys": 68}
    latent = {kind.name: kind.bytes_each for kind in cache(replace(V32, kv_lora_rank=512, qk_rope_head_dim=64, index_head_dim=128), 1)}
    assert latent == {"latents": 656, "index keys": 132}


@pytest.mark.parametrize(("config", "growth"), [(V4, 128), (V32, 1)], ids=["V4", "V3.2"])
def test_cache_grows_evenly(config, growth):
    sizes = [kv_bytes(config, length) for length in (0, growth, 2 * growth, 20 * growth)]
    assert sizes[1] - sizes[0] == sizes[2] - sizes[1] == (sizes[3] - sizes[0]) / 20 > 0
