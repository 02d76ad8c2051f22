"""Configurations of both architectures are read by `model_type`, and every wrong field is named with what was expected."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from model.config import ModelConfig, V32Config, load_config, parse_config

V4 = {
    "model_type": "deepseek_v4",
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "head_dim": 32,
    "qk_rope_head_dim": 8,
    "o_groups": 2,
    "compress_ratios": [0, 4, 128, 0],
    "index_head_dim": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "num_hash_layers": 1,
    "rope_scaling": {"type": "yarn", "factor": 16, "beta_fast": 32, "beta_slow": 1, "original_max_position_embeddings": 4096},
    "use_cache": True,
}
V32 = {
    "model_type": "deepseek_v32",
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 4,
    "topk_group": 2,
    "rope_scaling": {"type": "yarn", "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096},
}


def test_the_model_type_chooses_the_architecture(tmp_path: Path) -> None:
    for values, kind in ((V4, ModelConfig), (V32, V32Config)):
        file = tmp_path / f"{kind.__name__}.json"
        file.write_text(json.dumps(values))
        config = load_config(file)
        assert type(config) is kind and config.hidden_size == 64 and config.rope_scaling.original_max_position_embeddings == 4096


@pytest.mark.parametrize("values", [V4, V32], ids=["v4", "v32"])
def test_what_is_written_reads_back(values: dict, tmp_path: Path) -> None:
    config = parse_config(values)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    assert load_config(tmp_path / "config.json") == config


def test_the_score_temperature_of_the_release() -> None:
    assert V32Config().softmax_scale == pytest.approx(192**-0.5 * 1.3689**2, rel=1e-4)


@pytest.mark.parametrize(
    ("base", "field", "value", "expected"),
    [
        (V4, "compress_ratios", [0, 4, 128], "got 3 entries, expected 4"),
        (V4, "compress_ratios", [0, 8, 128, 0], "expected only 0, 4 and 128"),
        (V4, "compress_ratios", [0, 4, 128, 4], "for the MTP layer, expected 0"),
        (V4, "compress_ratios", "0,4", "expected a list of whole numbers"),
        (V4, "num_hash_layers", 4, "expected 0 to num_hidden_layers = 3"),
        (V4, "num_hash_layers", -1, "expected 0 to num_hidden_layers = 3"),
        (V4, "head_dim", 31, "expected an even number"),
        (V4, "head_dim", 4, "at least qk_rope_head_dim = 8"),
        (V4, "head_dim", 0, "expected a positive number"),
        (V4, "qk_rope_head_dim", 7, "expected an even number"),
        (V4, "index_head_dim", 15, "expected an even number"),
        (V4, "index_head_dim", 6, "at least qk_rope_head_dim = 8"),
        (V4, "num_attention_heads", 3, "expected a divisor of num_attention_heads = 3"),
        (V4, "num_experts_per_tok", 9, "expected 1 to n_routed_experts = 8"),
        (V4, "n_shared_experts", 2, "expected 1"),
        (V4, "num_nextn_predict_layers", 2, "expected 0 or 1"),
        (V4, "scoring_func", "sigmoid", "expected 'sqrtsoftplus'"),
        (V4, "topk_method", "greedy", "expected 'noaux_tc'"),
        (V4, "hidden_size", "64", "got '64', expected a whole number"),
        (V4, "hidden_size", 64.5, "expected a whole number"),
        (V4, "hidden_size", True, "got True, expected a whole number"),
        (V4, "rms_norm_eps", float("nan"), "got nan, expected a number"),
        (V4, "swiglu_limit", -1.0, "expected a positive number"),
        (V4, "norm_topk_prob", 1, "expected true or false"),
        (V4, "rope_scaling", None, "expected an object"),
        (V4, "rope_scaling", {"factor": 0.5}, "rope_scaling.factor: got 0.5, expected at least 1"),
        (V4, "rope_scaling", {"type": "linear"}, "rope_scaling.type: got 'linear', expected 'yarn'"),
        (V4, "rope_scaling", {"factor": None}, "rope_scaling.factor: got None, expected a number"),
        (V4, "eos_token_id", 129280, "expected 0 to below vocab_size = 129280"),
        (V4, "num_key_value_heads", 8, "got 8, expected 1"),
        (V4, "hidden_act", "gelu", "got 'gelu', expected 'silu'"),
        (V4, "tie_word_embeddings", True, "got True, expected False"),
        (V4, "model_type", "llama", "got 'llama', expected 'deepseek_v4' or 'deepseek_v32'"),
        (V32, "first_k_dense_replace", 4, "expected 0 to num_hidden_layers = 3"),
        (V32, "n_group", 3, "expected a divisor of n_routed_experts = 8"),
        (V32, "topk_group", 5, "expected 1 to n_group = 4"),
        (V32, "num_experts_per_tok", 6, "groups hold 4 experts"),
        (V32, "kv_lora_rank", 31, "expected an even number"),
        (V32, "v_head_dim", 0, "expected a positive number"),
        (V32, "rope_scaling", {"mscale": 0.707}, "got 0.707, expected mscale_all_dim = 1.0"),
        (V32, "scoring_func", "softmax", "expected 'sigmoid'"),
        (V32, "moe_layer_freq", 2, "got 2, expected 1"),
    ],
)
def test_a_wrong_field_is_named_with_file_value_and_expectation(
    base: dict, field: str, value: object, expected: str, tmp_path: Path
) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**base, field: value}))
    with pytest.raises(ValueError) as caught:
        load_config(file)
    message = str(caught.value)
    assert message.startswith(str(file)) and field in message and expected in message


def test_all_problems_come_together() -> None:
    with pytest.raises(ValueError, match=r"num_hash_layers: got 9.*head_dim: got 33"):
        parse_config({**V4, "num_hash_layers": 9, "head_dim": 33})


@pytest.mark.parametrize("text", ["{", "[]", "3", "\udcff"], ids=["cut", "list", "number", "bytes"])
def test_a_file_that_holds_no_configuration_is_named(text: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=r"config\.json"):
        load_config(file)
