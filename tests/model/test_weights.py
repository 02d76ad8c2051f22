"""Weights survive the disk in our own layout, and what is wrong with a checkpoint is named before anything is allocated."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from model import weights
from model.checkpoints import files
from model.config import ModelConfig
from model.tokenizer import Tokenizer
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


@pytest.fixture
def sharded(saved: tuple[Transformer, Path], monkeypatch: pytest.MonkeyPatch) -> tuple[Transformer, Path]:
    monkeypatch.setattr(files, "SHARD_BYTES", 8000)
    weights.save(saved[0], saved[1])
    return saved


def same(a: Transformer, b: Transformer) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_round_trip_is_exact(saved: tuple[Transformer, Path]) -> None:
    model, path = saved
    loaded = weights.load(path)
    assert loaded.config == model.config and same(loaded, model)
    assert {n: p.requires_grad for n, p in loaded.named_parameters()} == {n: p.requires_grad for n, p in model.named_parameters()}
    assert loaded.router_load().sum() == 0


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


def test_a_loaded_model_computes_the_same_in_fp32_and_nearly_so_in_bf16(saved: tuple[Transformer, Path]) -> None:
    model, path = saved
    tokens, whole = torch.arange(20), torch.tensor([0, 20])
    exact, rounded = weights.load(path), weights.load(path, dtype=torch.bfloat16)
    with torch.no_grad():
        expected = model(tokens, whole).last
        assert torch.equal(exact(tokens, whole).last, expected)
        torch.testing.assert_close(rounded(tokens, whole).last.float(), expected, atol=0.1, rtol=0.1)
    kept = {name for name, value in rounded.state_dict().items() if value.dtype == torch.float32}
    assert kept == {n for n in kept if n.endswith(("_fn", "_base", "_scale", "attn_sink", "ape", "gate.bias"))} and "hc_head_fn" in kept


def test_shards_are_read_like_one_file(sharded: tuple[Transformer, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model, path = sharded
    index = json.loads((path / weights.INDEX).read_text())
    shards = sorted(path.glob("*.safetensors"))
    assert len(shards) > 3 and {path / file for file in index["weight_map"].values()} == set(shards)
    assert index["metadata"]["total_size"] == sum(v.numel() * v.element_size() for s in shards for v in load_file(s).values())
    assert same(weights.load(path), model)
    monkeypatch.setattr(files, "WINDOW_BYTES", 200)  # tensors then come in pieces
    assert same(weights.load(path), model)


def test_saving_again_replaces_all_of_a_checkpoint_and_nothing_else(sharded: tuple[Transformer, Path], monkeypatch) -> None:
    model, path = sharded
    (path / "notes.txt").write_text("mine")
    monkeypatch.undo()
    with torch.no_grad():
        model.norm.weight.fill_(2)
    weights.save(model, path)
    assert {file.name for file in path.iterdir()} == {weights.CONFIG, weights.TENSORS, "notes.txt"}
    assert same(weights.load(path), model)


def test_a_failed_save_leaves_nothing_and_what_was_there(saved: tuple[Transformer, Path], tmp_path: Path) -> None:
    model, path = saved
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    with torch.no_grad():
        model.layers[1].attn.wq_a.weight[0, 0] = float("nan")
    for target in (path, tmp_path / "new"):
        with pytest.raises(ValueError, match="not finite"):
            weights.save(model, target, layout="official")
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "gguf"}, "layout: got 'gguf', expected one of native, official, transformers"),
        ({"layout": "official", "precision": "int4"}, "precision: got 'int4', expected one of fp4, fp8, bf16, fp32 for the official"),
        ({"layout": "transformers", "precision": "fp4"}, "precision: got 'fp4', expected one of bf16, fp32 for the transformers"),
    ],
)
def test_unknown_layouts_and_precisions_are_refused(saved: tuple[Transformer, Path], tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        weights.save(saved[0], tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


def refused(path: Path) -> str:
    with pytest.raises(ValueError) as caught:
        weights.load(path)
    return str(caught.value)


def test_wrong_tensors_are_listed_together(saved: tuple[Transformer, Path]) -> None:
    path = saved[1]
    tensors = load_file(path / weights.TENSORS)
    del tensors["norm.weight"]
    tensors["extra"] = torch.zeros(1)
    tensors["head.weight"] = torch.zeros(3, 16)
    tensors["layers.0.attn.wq_a.weight"] = torch.zeros(8, 16, dtype=torch.int64)
    save_file(tensors, path / weights.TENSORS)
    message, file = refused(path), path / weights.TENSORS
    assert f"{file}: head.weight: got shape [3, 16] F32, expected [20, 16]" in message
    assert f"{file}: layers.0.attn.wq_a.weight: got dtype I64, expected F32 or BF16 or F16 or F8_E4M3" in message
    assert f"{file}: unexpected extra [1]" in message
    assert f"{path}: missing norm.weight, expected [16]" in message


def test_a_message_stays_short_when_everything_is_wrong(saved: tuple[Transformer, Path]) -> None:
    save_file({f"tensor.{i}": torch.zeros(1) for i in range(500)}, saved[1] / weights.TENSORS)
    message = refused(saved[1])
    assert len(message.splitlines()) < 60 and message.splitlines()[-1].startswith("... and ")


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_truncated_file_is_named(saved: tuple[Transformer, Path], keep: int) -> None:
    file = saved[1] / weights.TENSORS
    whole = file.read_bytes()
    file.write_bytes(whole[:keep])
    message = refused(saved[1])
    assert f"{file}: damaged: got {len(whole[:keep])} bytes, expected" in message
    assert keep >= 0 or f"expected {len(whole)}" in message


def test_missing_and_truncated_shards_are_listed_together(sharded: tuple[Transformer, Path]) -> None:
    path = sharded[1]
    shards = sorted(path.glob("*.safetensors"))
    shards[0].unlink()
    shards[2].write_bytes(shards[2].read_bytes()[:-7])
    message = refused(path)
    assert f"{shards[0]}: missing, expected" in message and f"{shards[2]}: damaged" in message and str(shards[1]) not in message


def test_an_index_that_is_wrong_is_refused(sharded: tuple[Transformer, Path]) -> None:
    path = sharded[1]
    index = json.loads((path / weights.INDEX).read_text())
    first, second = sorted(set(index["weight_map"].values()))[:2]
    moved = next(name for name, file in index["weight_map"].items() if file == first)
    index["weight_map"][moved] = second
    (path / weights.INDEX).write_text(json.dumps(index))
    assert f"{path / second}: missing {moved}, expected it as {weights.INDEX} says" in refused(path)
    (path / weights.INDEX).write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))
    assert f"{path / weights.INDEX}: weight_map" in refused(path)
    (path / weights.INDEX).unlink()
    with pytest.raises(FileNotFoundError, match=weights.INDEX):
        weights.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"o_groups": 0}, "o_groups: got 0, expected"),
        ({"compress_ratios": [4, 128]}, "compress_ratios: got 2 entries, expected 3"),
        ({"num_hash_layers": 3}, "num_hash_layers: got 3, expected 0 to num_hidden_layers = 2"),
        ({"qk_rope_head_dim": 3}, "qk_rope_head_dim: got 3, expected an even number"),
        ({"head_dim": 9}, "head_dim: got 9, expected an even number"),
        ({"hidden_size": "16"}, "hidden_size: got '16', expected a whole number"),
        ({"hidden_act": "gelu"}, "hidden_act: got 'gelu', expected 'silu'"),
        ({"model_type": "llama"}, "model_type: got 'llama', expected 'deepseek_v4'"),
        ({"n_routed_experts": 8}, "layers.0.ffn.experts.w1: got shape [4, 8, 16] F32, expected [8, 8, 16]"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_wrong_fields_are_named(saved: tuple[Transformer, Path], change: dict, message: str) -> None:
    file = saved[1] / weights.CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    found = refused(saved[1])
    assert message in found and str(file.parent) in found


def test_a_damaged_config_is_named(saved: tuple[Transformer, Path]) -> None:
    file = saved[1] / weights.CONFIG
    file.write_text(file.read_text()[:40])
    assert f"{file}: damaged" in refused(saved[1])


def test_a_routing_table_without_such_experts_is_refused(saved: tuple[Transformer, Path]) -> None:
    file = saved[1] / weights.TENSORS
    tensors = load_file(file)
    tensors["layers.0.ffn.gate.tid2eid"][3, 1] = 4
    save_file(tensors, file)
    assert f"{file}: layers.0.ffn.gate.tid2eid: got expert 4, expected 0 to n_routed_experts - 1 = 3" in refused(saved[1])


def test_a_tokenizer_larger_than_the_embedding_is_refused(saved: tuple[Transformer, Path]) -> None:
    tokenizer = Tokenizer.train(["a text"], 400)
    tokenizer.save(saved[1])
    assert f"tokenizer.json: vocabulary: got {tokenizer.vocab_size} tokens, expected at most" in refused(saved[1])


def test_what_is_wrong_is_found_before_memory_is_allocated(saved: tuple[Transformer, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The configuration asks for a petabyte; nobody notices but the message."""
    file = saved[1] / weights.CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | {"hidden_size": 2**24, "moe_intermediate_size": 2**24}))
    assert "layers.1.ffn.experts.w1: got shape [4, 8, 16] F32, expected [4, 16777216, 16777216]" in refused(saved[1])


def test_a_missing_model_is_named(tmp_path: Path, saved: tuple[Transformer, Path]) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        weights.load(tmp_path)
    (saved[1] / weights.TENSORS).unlink()
    with pytest.raises(FileNotFoundError, match=weights.TENSORS):
        weights.load(saved[1])
