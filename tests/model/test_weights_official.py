"""The release's layout: its names, shapes and dtypes, byte for byte through FP8 and FP4 and back."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from model import weights
from model.checkpoints import files
from model.config import ModelConfig
from model.tokenizer import Tokenizer
from tiny_models import lively

CONFIG = ModelConfig(
    vocab_size=40,
    hidden_size=160,
    num_hidden_layers=3,
    num_attention_heads=4,
    head_dim=64,
    qk_rope_head_dim=16,
    q_lora_rank=32,
    o_groups=2,
    o_lora_rank=32,
    sliding_window=8,
    compress_ratios=[0, 4, 128, 0],
    index_n_heads=4,
    index_head_dim=32,
    index_topk=4,
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=96,
    num_hash_layers=1,
    initializer_range=0.2,
)
FP8, SCALE, FP4 = torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.int8
CODES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])

LISTED = """
embed.weight, head.weight | 40 160 | bfloat16
norm.weight, mtp.0.norm.weight, mtp.0.enorm.weight, mtp.0.hnorm.weight | 160 | bfloat16
hc_head_fn, mtp.0.hc_head_fn | 4 640 | float32
hc_head_base, mtp.0.hc_head_base | 4 | float32
hc_head_scale, mtp.0.hc_head_scale | 1 | float32
B.attn_norm.weight, B.ffn_norm.weight | 160 | bfloat16
B.hc_attn_fn, B.hc_ffn_fn | 24 640 | float32
B.hc_attn_base, B.hc_ffn_base | 24 | float32
B.hc_attn_scale, B.hc_ffn_scale | 3 | float32
B.attn.wq_a | 32 160 | fp8
B.attn.q_norm.weight | 32 | bfloat16
B.attn.wq_b | 256 32 | fp8
B.attn.wkv | 64 160 | fp8
B.attn.kv_norm.weight | 64 | bfloat16
B.attn.wo_a | 64 128 | fp8
B.attn.wo_b | 160 64 | fp8
B.attn.attn_sink | 4 | float32
layers.1.attn.compressor.wkv.weight, layers.1.attn.compressor.wgate.weight | 128 160 | bfloat16
layers.1.attn.compressor.ape | 4 128 | float32
layers.1.attn.compressor.norm.weight, layers.2.attn.compressor.norm.weight | 64 | bfloat16
layers.2.attn.compressor.wkv.weight, layers.2.attn.compressor.wgate.weight | 64 160 | bfloat16
layers.2.attn.compressor.ape | 128 64 | float32
layers.1.attn.indexer.wq_b | 128 32 | fp8
layers.1.attn.indexer.weights_proj.weight | 4 160 | bfloat16
layers.1.attn.indexer.compressor.wkv.weight, layers.1.attn.indexer.compressor.wgate.weight | 64 160 | bfloat16
layers.1.attn.indexer.compressor.ape | 4 64 | float32
layers.1.attn.indexer.compressor.norm.weight | 32 | bfloat16
B.ffn.gate.weight | 4 160 | bfloat16
layers.0.ffn.gate.tid2eid | 40 2 | int64
layers.1.ffn.gate.bias, layers.2.ffn.gate.bias, mtp.0.ffn.gate.bias | 4 | float32
B.ffn.experts.E.w1, B.ffn.experts.E.w3 | 96 160 | fp4
B.ffn.experts.E.w2 | 160 96 | fp4
B.ffn.shared_experts.w1, B.ffn.shared_experts.w3 | 96 160 | fp8
B.ffn.shared_experts.w2 | 160 96 | fp8
mtp.0.e_proj, mtp.0.h_proj | 160 160 | fp8
"""
"""Names, shapes and dtypes of v4_spec 2.7, at this size; B any block, E any expert."""


def listed() -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for line in LISTED.strip().splitlines():
        names, sizes, kind = (part.strip() for part in line.split("|"))
        shape = tuple(map(int, sizes.split()))
        for pattern in names.split(", "):
            blocks = ["layers.0", "layers.1", "layers.2", "mtp.0"] if pattern.startswith("B.") else [""]
            for name in [re.sub("^B", block, pattern) for block in blocks]:
                for stem in [name.replace(".E.", f".{e}.") for e in range(4)] if ".E." in name else [name]:
                    if kind == "fp8":
                        found[f"{stem}.weight"] = shape, FP8
                        found[f"{stem}.scale"] = tuple(-(-size // 128) for size in shape), SCALE
                    elif kind == "fp4":
                        found[f"{stem}.weight"] = (shape[0], shape[1] // 2), FP4
                        found[f"{stem}.scale"] = (shape[0], shape[1] // 32), SCALE
                    else:
                        found[stem] = shape, getattr(torch, kind)
    return found


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in sorted(path.glob("*.safetensors")) for name, value in load_file(file).items()}


def bytes_of(path: Path) -> dict[str, bytes]:
    return {name: bytes(value.contiguous().flatten().view(torch.uint8).tolist()) for name, value in tensors_of(path).items()}


def values_of(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Decode by torch's own types and a table, the slow way."""
    if weight.dtype == FP8:
        wide = scale.float().repeat_interleave(128, 0).repeat_interleave(128, 1)
        return weight.float() * wide[: weight.shape[0], : weight.shape[1]]
    codes = torch.stack([weight.view(torch.uint8) & 15, weight.view(torch.uint8) >> 4], -1).flatten(1)
    return CODES[codes.long()] * scale.float().repeat_interleave(32, 1)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("official") / "model"
    weights.save(lively(CONFIG), path, layout="official")
    return path


def test_names_shapes_and_dtypes_are_the_releases(exported: Path) -> None:
    assert {name: (tuple(v.shape), v.dtype) for name, v in tensors_of(exported).items()} == listed()
    config = json.loads((exported / weights.CONFIG).read_text())
    assert config["architectures"] == ["DeepseekV4ForCausalLM"] and config["expert_dtype"] == "fp4"
    assert config["quantization_config"] == {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
    }


def test_values_are_those_of_the_files(exported: Path) -> None:
    model, stored = weights.load(exported), tensors_of(exported)
    state = model.state_dict()
    assert model.config == CONFIG
    for name, value in stored.items():
        if name.endswith(".scale"):
            continue
        expert = re.match(r"(.*experts)\.(\d+)\.(w[123])\.weight$", name)
        ours = state[f"{expert[1]}.{expert[3]}"][int(expert[2])] if expert else state[name]
        scale = stored.get(name.removesuffix(".weight") + ".scale")
        assert torch.equal(ours, value.to(ours.dtype) if scale is None else values_of(value, scale)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("precision", ["fp4", "fp8", "bf16"])
def test_round_trip_is_bit_for_bit(tmp_path: Path, precision: str, dtype: torch.dtype) -> None:
    weights.save(lively(CONFIG), tmp_path / "a", layout="official", precision=precision)
    weights.save(weights.load(tmp_path / "a", dtype=dtype), tmp_path / "b", layout="official")
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b")
    assert (tmp_path / "a" / weights.CONFIG).read_text() == (tmp_path / "b" / weights.CONFIG).read_text()


def test_fp32_loses_nothing(tmp_path: Path) -> None:
    model = lively(CONFIG)
    weights.save(model, tmp_path / "a", layout="official", precision="fp32")
    loaded = weights.load(tmp_path / "a").state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in model.state_dict().items())
    assert {v.dtype for v in tensors_of(tmp_path / "a").values()} == {torch.float32, torch.int64}


def test_base_checkpoints_have_fp8_experts(tmp_path: Path) -> None:
    weights.save(lively(CONFIG), tmp_path / "a", layout="official", precision="fp8")
    stored = tensors_of(tmp_path / "a")
    assert stored["layers.0.ffn.experts.0.w1.weight"].dtype == FP8 and stored["layers.0.ffn.experts.0.w1.scale"].shape == (1, 2)
    assert "expert_dtype" not in json.loads((tmp_path / "a" / weights.CONFIG).read_text())


@pytest.mark.parametrize("claimed", ["fp8", None])
def test_fp4_is_recognised_by_dtype_whatever_the_config_says(exported: Path, tmp_path: Path, claimed: str | None) -> None:
    config = json.loads((exported / weights.CONFIG).read_text()) | {"expert_dtype": claimed}
    save_file(tensors_of(exported), tmp_path / weights.TENSORS)
    (tmp_path / weights.CONFIG).write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    ours, theirs = weights.load(tmp_path).state_dict(), weights.load(exported).state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def foreign(exported: Path, path: Path) -> dict[str, torch.Tensor]:
    """Rewrite a checkpoint with random codes under random scales, as no rule of ours would have chosen them."""
    torch.manual_seed(2)
    tensors = tensors_of(exported)
    for name, value in tensors.items():
        if value.dtype == FP8:
            tensors[name] = (torch.randn(value.shape) * 40).clamp(-224, 224).to(FP8)
        elif value.dtype == FP4:
            tensors[name] = torch.randint(-128, 128, value.shape, dtype=torch.int8)
            tensors[name][:, :16] &= 0b01010101  # groups whose largest code is below 4
        elif value.dtype == SCALE:
            tensors[name] = torch.randint(110, 130, value.shape, dtype=torch.uint8).view(SCALE)
    path.mkdir()
    save_file(tensors, path / weights.TENSORS)
    (path / weights.CONFIG).write_bytes((exported / weights.CONFIG).read_bytes())
    return tensors


def test_foreign_scales_come_back_as_they_were(exported: Path, tmp_path: Path) -> None:
    foreign(exported, tmp_path / "a")
    weights.save(weights.load(tmp_path / "a"), tmp_path / "b", layout="official")
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b")


def test_after_a_step_of_the_pipeline_the_scales_may_be_others_but_no_value(exported: Path, tmp_path: Path) -> None:
    foreign(exported, tmp_path / "a")
    weights.save(weights.load(tmp_path / "a"), tmp_path / "native")
    weights.save(weights.load(tmp_path / "native"), tmp_path / "b", layout="official")
    a, b = weights.load(tmp_path / "a").state_dict(), weights.load(tmp_path / "b").state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert bytes_of(tmp_path / "a") != bytes_of(tmp_path / "b")


def test_only_trained_tensors_get_new_bytes(exported: Path, tmp_path: Path) -> None:
    foreign(exported, tmp_path / "a")
    model = weights.load(tmp_path / "a")
    with torch.no_grad():
        model.layers[1].ffn.experts.w2[2].mul_(1.1)
        model.layers[0].attn.wo_b.weight.mul_(1000)
    weights.save(model, tmp_path / "b", layout="official")
    before, after = bytes_of(tmp_path / "a"), bytes_of(tmp_path / "b")
    changed = {name for name in before if before[name] != after[name]}
    assert {name.rpartition(".")[0] for name in changed} == {"layers.1.ffn.experts.2.w2", "layers.0.attn.wo_b"}
    again = weights.load(tmp_path / "b").layers[0].attn.wo_b.weight
    torch.testing.assert_close(again, model.layers[0].attn.wo_b.weight, rtol=2**-4, atol=0.01 * float(again.detach().abs().max()))


def test_scales_may_lie_in_another_shard_than_their_matrices(exported: Path, tmp_path: Path) -> None:
    tensors = tensors_of(exported)
    parts = {"a.safetensors": {k: v for k, v in tensors.items() if k.endswith(".scale")}}
    parts["b.safetensors"] = {k: v for k, v in tensors.items() if not k.endswith(".scale")}
    for file, part in parts.items():
        save_file(part, tmp_path / file)
    placed = {name: file for file, part in parts.items() for name in part}
    (tmp_path / weights.INDEX).write_text(json.dumps({"weight_map": placed}))
    (tmp_path / weights.CONFIG).write_bytes((exported / weights.CONFIG).read_bytes())
    ours, theirs = weights.load(tmp_path).state_dict(), weights.load(exported).state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_many_shards_round_trip(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "SHARD_BYTES", 30_000)
    weights.save(weights.load(exported), tmp_path / "b", layout="official")
    assert len(list((tmp_path / "b").glob("model-*-of-*.safetensors"))) > 5
    assert bytes_of(tmp_path / "b") == bytes_of(exported)


def spoiled(exported: Path, path: Path, change) -> str:
    tensors = tensors_of(exported)
    change(tensors)
    save_file(tensors, path / weights.TENSORS)
    (path / weights.CONFIG).write_bytes((exported / weights.CONFIG).read_bytes())
    with pytest.raises(ValueError) as caught:
        weights.load(path)
    return str(caught.value)


def test_nan_scales_are_refused_all_at_once(exported: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["layers.1.ffn.experts.3.w2.scale"].view(torch.uint8)[5, 1] = 255
        tensors["mtp.0.e_proj.scale"].view(torch.uint8)[:] = 255

    message = spoiled(exported, tmp_path, change)
    file = tmp_path / weights.TENSORS
    assert f"{file}: layers.1.ffn.experts.3.w2.scale: got 1 scales that are NaN" in message
    assert f"{file}: mtp.0.e_proj.scale: got 4 scales that are NaN" in message


def test_quantised_tensors_that_do_not_fit_are_listed(exported: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["layers.0.attn.wq_a.scale"]
        tensors["layers.0.attn.wq_b.scale"] = torch.zeros(1, 1, dtype=torch.uint8).view(SCALE)
        tensors["layers.0.ffn.experts.0.w1.weight"] = torch.zeros(96, 160, dtype=torch.int8)
        tensors["layers.0.attn.wkv.weight"] = torch.zeros(64, 160, dtype=torch.bfloat16)
        tensors["norm.weight"] = torch.zeros(160, dtype=FP8)
        del tensors["mtp.0.hc_head_fn"]

    message = spoiled(exported, tmp_path, change)
    for line in (
        "layers.0.attn.wq_a.scale: missing, expected [1, 2] F8_E8M0",
        "layers.0.attn.wq_b.scale: got [1, 1] F8_E8M0, expected [2, 1]",
        "layers.0.ffn.experts.0.w1.weight: got shape [96, 160] I8, expected [96, 80]",
        "layers.0.attn.wkv.scale: unexpected, layers.0.attn.wkv.weight is BF16",
        "norm.weight: got dtype F8_E4M3, expected F32 or BF16 or F16",
        "missing mtp.0.hc_head_fn, expected [4, 640]",
    ):
        assert line in message


def test_odd_widths_cannot_be_fp4(tmp_path: Path) -> None:
    config = ModelConfig(**{**CONFIG.to_dict(), "moe_intermediate_size": 33, "rope_scaling": CONFIG.rope_scaling})
    with pytest.raises(ValueError, match=r"experts\.0\.w2\.weight: got \[160, 33\], expected an even width"):
        weights.save(lively(config), tmp_path / "a", layout="official")


def test_the_tokenizer_goes_along(exported: Path, tmp_path: Path) -> None:
    config = ModelConfig(**{**CONFIG.to_dict(), "vocab_size": 400, "rope_scaling": CONFIG.rope_scaling})
    tokenizer = Tokenizer.train(["some text to learn from"], 400)
    (tmp_path / "source").mkdir()
    tokenizer.save(tmp_path / "source")
    weights.save(lively(config), tmp_path / "a", layout="official", companions=tmp_path / "source")
    assert Tokenizer.load(tmp_path / "a").digest() == tokenizer.digest()
    weights.load(tmp_path / "a")
    beside = json.loads((tmp_path / "a" / "tokenizer_config.json").read_text())
    assert beside["bos_token"] == "<｜begin▁of▁sentence｜>" and beside["eos_token"] == beside["pad_token"] == "<｜end▁of▁sentence｜>"
