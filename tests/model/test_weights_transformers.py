"""What we export loads in transformers and computes the same; what transformers saves loads in ours."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoTokenizer, DeepseekV4Config, DeepseekV4ForCausalLM, DeepseekV32Config, DeepseekV32ForCausalLM

import tiny_models
from model import weights
from model.config import ModelConfig, RopeScaling, V32Config, V32RopeScaling
from model.tokenizer import Tokenizer
from model.transformer import Transformer
from tiny_models import lively

V4 = replace(tiny_models.V4, routed_scaling_factor=1.7, rope_scaling=RopeScaling(factor=4.0, original_max_position_embeddings=64))
V32 = replace(
    tiny_models.V32,
    vocab_size=99,
    kv_lora_rank=16,
    qk_nope_head_dim=16,
    v_head_dim=12,
    index_topk=8,
    num_nextn_predict_layers=1,
    max_position_embeddings=4096,
    rope_scaling=V32RopeScaling(factor=4.0, original_max_position_embeddings=64),
)
ORACLES = {"deepseek_v4": (DeepseekV4ForCausalLM, DeepseekV4Config), "deepseek_v32": (DeepseekV32ForCausalLM, DeepseekV32Config)}
both = pytest.mark.parametrize("config", [V4, V32], ids=lambda config: config.model_type)


def oracle(path: Path, kind: str) -> torch.nn.Module:
    """Load as a user of transformers does; nothing may be missing, left over or of another shape."""
    model, report = ORACLES[kind][0].from_pretrained(path, dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


@torch.no_grad()
def assert_same_logits(ours: Transformer, theirs: torch.nn.Module) -> None:
    for length in (1, 7, 130, 301):
        tokens = torch.randint(ours.config.vocab_size, (length,))
        logits = ours.head(ours(tokens, torch.tensor([0, length])).last)
        torch.testing.assert_close(logits, theirs(tokens[None]).logits[0], atol=1e-4, rtol=0)


def names_of(path: Path) -> dict[str, tuple[list[int], str]]:
    found = {}
    for file in path.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (not a mapping)
                found[name] = opened.get_slice(name).get_shape(), opened.get_slice(name).get_dtype()
    return found


@both
def test_our_export_computes_the_same_in_transformers(config: ModelConfig | V32Config, tmp_path: Path) -> None:
    model = lively(config)
    weights.save(model, tmp_path / "a", layout="transformers")
    assert_same_logits(model, oracle(tmp_path / "a", config.model_type))


@both
@pytest.mark.parametrize("original", [True, False], ids=["as saved by default", "in module names"])
def test_what_transformers_saves_computes_the_same_in_ours(config: ModelConfig | V32Config, original: bool, tmp_path: Path) -> None:
    weights.save(lively(config), tmp_path / "a", layout="transformers")
    theirs = oracle(tmp_path / "a", config.model_type)
    theirs.save_pretrained(tmp_path / "b", save_original_format=original)
    ours = weights.load(tmp_path / "b")
    assert ours.config.num_nextn_predict_layers == 0  # transformers has no such block and drops it
    assert_same_logits(ours, theirs)


@both
def test_our_export_is_what_transformers_writes(config: ModelConfig | V32Config, tmp_path: Path) -> None:
    weights.save(lively(config), tmp_path / "a", layout="transformers")
    oracle(tmp_path / "a", config.model_type).save_pretrained(tmp_path / "b")
    ours, theirs = names_of(tmp_path / "a"), names_of(tmp_path / "b")
    assert {name: value for name, value in ours.items() if not name.startswith("mtp.")} == theirs
    configs = [ORACLES[config.model_type][1].from_pretrained(tmp_path / name).to_dict() for name in "ab"]
    apart = {key for key in configs[0] | configs[1] if configs[0].get(key) != configs[1].get(key)}
    assert apart <= {"transformers_version", "topk_method", "scoring_func", "_name_or_path"}


def test_a_config_transformers_made_by_itself_is_read(tmp_path: Path) -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 32.0, "beta_slow": 1.0}
    values = {name: value for name, value in V4.to_dict().items() if name not in ("rope_scaling", "topk_method", "model_type")}
    torch.manual_seed(4)
    theirs = DeepseekV4ForCausalLM(
        DeepseekV4Config(**values | {"compress_ratios": V4.compress_ratios[:-1]}, rope_parameters=yarn, attn_implementation="eager")
    ).eval()
    for name, value in theirs.state_dict().items():
        if name.endswith("tid2eid"):
            value.copy_(torch.rand(V4.vocab_size, V4.n_routed_experts).topk(V4.num_experts_per_tok).indices)
    theirs.save_pretrained(tmp_path / "a")
    ours = weights.load(tmp_path / "a")
    expected = replace(V4, num_nextn_predict_layers=0, compress_ratios=V4.compress_ratios[:-1])
    assert ours.config == expected
    assert_same_logits(ours, theirs)


@both
def test_round_trip_through_the_layout_is_exact(config: ModelConfig | V32Config, tmp_path: Path) -> None:
    """MTP included: it lies there under the release's names, which transformers ignores."""
    model = lively(config)
    weights.save(model, tmp_path / "a", layout="transformers")
    loaded = weights.load(tmp_path / "a")
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert isinstance(config, V32Config) or loaded.config == config


@both
@pytest.mark.parametrize("layout", ["official", "transformers"])
def test_bf16_exports_load_in_transformers(config: ModelConfig | V32Config, layout: str, tmp_path: Path) -> None:
    weights.save(lively(config), tmp_path / "a", layout=layout, precision="bf16")
    if layout == "official" and config is V4:  # transformers reads the release's names, with its own keys of the configuration
        weights.save(lively(config), tmp_path / "b", layout="transformers")
        (tmp_path / "a" / weights.CONFIG).write_bytes((tmp_path / "b" / weights.CONFIG).read_bytes())
    assert_same_logits(weights.load(tmp_path / "a"), oracle(tmp_path / "a", config.model_type))


@both
def test_v32_and_v4_go_through_the_official_layout_bit_for_bit(config: ModelConfig | V32Config, tmp_path: Path) -> None:
    weights.save(lively(config), tmp_path / "a", layout="official")
    weights.save(weights.load(tmp_path / "a"), tmp_path / "b", layout="official")
    assert (tmp_path / "a" / weights.TENSORS).read_bytes() == (tmp_path / "b" / weights.TENSORS).read_bytes()


def test_v32_official_matrices_are_fp8_with_fp32_scales(tmp_path: Path) -> None:
    weights.save(lively(V32), tmp_path / "a", layout="official")
    stored = names_of(tmp_path / "a")
    for stem in ("self_attn.kv_a_proj_with_mqa", "self_attn.indexer.wk", "mlp.experts.3.gate_proj", "mlp.shared_experts.down_proj"):
        assert stored[f"model.layers.1.{stem}.weight"][1] == "F8_E4M3" and stored[f"model.layers.1.{stem}.weight_scale_inv"][1] == "F32"
    for name in ("self_attn.q_a_layernorm.weight", "self_attn.kv_a_layernorm.weight", "mlp.gate.weight"):
        assert stored[f"model.layers.1.{name}"][1] == "BF16"
    assert stored["model.layers.1.mlp.gate.e_score_correction_bias"][1] == "F32"


def test_the_mtp_block_of_a_v32_release_is_skipped(tmp_path: Path) -> None:
    model = lively(V32)
    weights.save(model, tmp_path / "a", layout="transformers")
    deeper = Transformer(replace(V32, num_hidden_layers=4))
    weights.save(deeper, tmp_path / "b", layout="transformers")  # its layer 3 lies where the release has MTP
    (tmp_path / "b" / weights.CONFIG).write_bytes((tmp_path / "a" / weights.CONFIG).read_bytes())
    assert len(weights.load(tmp_path / "b").layers) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer_types": ["sliding_attention"] * 3}, "layer_types: got 3 entries, expected num_hidden_layers = 4"),
        ({"layer_types": ["full_attention"] * 4}, "layer_types: got 'full_attention', expected one of sliding_attention"),
        ({"mlp_layer_types": ["moe", "hash_moe", "moe", "moe"]}, "mlp_layer_types: got"),
        ({"compress_rates": {"compressed_sparse_attention": 8}}, "compress_rates: got"),
        ({"rope_parameters": {"main": {}, "compress": {"rope_type": "longrope", "rope_theta": 1e5}}}, "rope_scaling.type: got 'longrope'"),
        (
            {"rope_parameters": {"main": {}, "compress": {"attention_factor": 1.3}}},
            "rope_parameters: got attention_factor 1.3, expected 1.0",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_fields_of_transformers_that_we_cannot_honour_are_refused(change: dict, message: str, tmp_path: Path) -> None:
    weights.save(lively(V4), tmp_path / "a", layout="transformers")
    file = tmp_path / "a" / weights.CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError) as caught:
        weights.load(tmp_path / "a")
    assert str(file) in str(caught.value) and message in str(caught.value)


def test_the_tokenizer_loads_in_transformers(tmp_path: Path) -> None:
    tokenizer = Tokenizer.train(["some text to learn from"], 400)
    (tmp_path / "source").mkdir()
    tokenizer.save(tmp_path / "source")
    weights.save(lively(replace(V4, vocab_size=400)), tmp_path / "a", layout="transformers", companions=tmp_path / "source")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "a")
    text = "<｜User｜>some text, 12345<｜Assistant｜></think>"
    assert theirs(text, add_special_tokens=False).input_ids == tokenizer.encode(text)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (0, 1, 1)
