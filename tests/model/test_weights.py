"""Weights survive the disk, and damage is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from model import weights
from model.config import ModelConfig
from model.transformer import Transformer

CONFIG = ModelConfig(
    vocab_size=20,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    head_dim=8,
    qk_rope_head_dim=4,
    q_lora_rank=8,
    o_groups=1,
    o_lora_rank=8,
    sliding_window=8,
    compress_ratios=[4, 128, 0],
    index_n_heads=2,
    index_head_dim=8,
    index_topk=4,
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=8,
    num_hash_layers=1,
)


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Transformer, Path]:
    torch.manual_seed(0)
    model = Transformer(CONFIG)
    model.layers[1].ffn.gate.bias.normal_()
    weights.save(model, tmp_path / "model")
    return model, tmp_path / "model"


def test_round_trip_is_exact(saved: tuple[Transformer, Path]) -> None:
    model, path = saved
    loaded = weights.load(path)
    assert loaded.config == model.config
    expected, got = model.state_dict(), loaded.state_dict()
    assert expected.keys() == got.keys() and all(torch.equal(expected[k], got[k]) for k in expected)


def test_names_are_the_releases(saved: tuple[Transformer, Path]) -> None:
    names = load_file(saved[1] / weights.TENSORS).keys()
    for name in (
        "embed.weight",
        "hc_head_fn",
        "layers.0.attn.indexer.compressor.wkv.weight",
        "layers.0.attn.compressor.ape",
        "layers.0.ffn.gate.tid2eid",
        "layers.1.ffn.gate.bias",
        "layers.1.hc_ffn_scale",
        "layers.1.ffn.experts.w2",
        "layers.1.ffn.shared_experts.w3.weight",
        "mtp.0.e_proj.weight",
        "mtp.0.hc_head_base",
    ):
        assert name in names


def test_wrong_tensors_are_listed_together(saved: tuple[Transformer, Path]) -> None:
    path = saved[1]
    tensors = load_file(path / weights.TENSORS)
    del tensors["norm.weight"]
    tensors["extra"] = torch.zeros(1)
    tensors["head.weight"] = torch.zeros(3, 16)
    save_file(tensors, path / weights.TENSORS)
    with pytest.raises(ValueError, match=r"head.weight: got shape \(3, 16\), expected \(20, 16\); missing norm.weight; unexpected extra"):
        weights.load(path)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_truncated_file_is_named(saved: tuple[Transformer, Path], keep: int) -> None:
    file = saved[1] / weights.TENSORS
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model.safetensors: damaged"):
        weights.load(saved[1])


def test_a_wrong_or_damaged_config_is_named(saved: tuple[Transformer, Path]) -> None:
    file = saved[1] / weights.CONFIG
    values = json.loads(file.read_text())
    file.write_text(json.dumps({**values, "o_groups": 0}))
    with pytest.raises(ValueError, match="o_groups"):
        weights.load(saved[1])
    file.write_text(file.read_text()[:40])
    with pytest.raises(ValueError, match=r"config\.json"):
        weights.load(saved[1])


def test_a_missing_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        weights.load(tmp_path)
