"""What lies beside the tensors of a checkpoint: `config.json` in the release's keys or in transformers', and the tokenizer's files.

Loads without torch: a wrong `model.path` is answered at once.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from model.config import AnyConfig, ModelConfig, parse_config

CONFIG = "config.json"

RATIOS = {"sliding_attention": 0, "compressed_sparse_attention": 4, "heavily_compressed_attention": 128}
"""Compress ratio of each of transformers' `layer_types`. Source: transformers 5.23, DeepseekV4Config."""

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
COMPANIONS = (TOKENIZER, TOKENIZER_CONFIG, "special_tokens_map.json", "chat_template.jinja", "generation_config.json")
"""Files that travel with a checkpoint unchanged."""

_ARCHITECTURES = {"deepseek_v4": "DeepseekV4ForCausalLM", "deepseek_v32": "DeepseekV32ForCausalLM"}

_QUANTIZATION = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "scale_fmt": "ue8m0",
    "weight_block_size": [128, 128],
}
"""Source: config.json of the V4 and V3.2 releases."""


def read_config(path: Path) -> AnyConfig:
    """Read the `config.json` of a checkpoint, whoever wrote it.

    Args:
        path: directory of the checkpoint.

    Raises:
        ValueError: the file is damaged or its fields contradict each other; names file, fields, values and expectations.
        FileNotFoundError: there is no such file.
    """
    file = path / CONFIG
    values = read_json(file)
    try:
        return parse_config(_release_keys(values))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def write_config(path: Path, config: AnyConfig, *, layout: str, formats: set[str]) -> None:
    """Write the `config.json` of a checkpoint in the directory `path`.

    Args:
        path: an existing directory.
        config: of the model.
        layout: `native`, `official` or `transformers`; decides the keys.
        formats: in which its tensors are stored, among `fp32`, `bf16`, `fp8`, `fp4`.
    """
    values = config.to_dict()
    if layout != "native":
        values |= {"architectures": [_ARCHITECTURES[config.model_type]], "attention_bias": False, "hidden_act": "silu"}
        values |= {
            "tie_word_embeddings": False,
            "num_key_value_heads": 1 if config.model_type == "deepseek_v4" else config.num_attention_heads,
        }
        values["torch_dtype"] = "float32" if formats == {"fp32"} else "bfloat16"
    if config.model_type == "deepseek_v32":
        values["num_nextn_predict_layers"] = 0  # its block is neither built nor written
    if layout == "transformers":
        values = _transformers_keys(config, values)
    if "fp8" in formats:
        values["quantization_config"] = dict(_QUANTIZATION)
    if "fp4" in formats:
        values["expert_dtype"] = "fp4"
    write_json(path / CONFIG, values)


def check_tokenizer(path: Path, config: AnyConfig) -> None:
    """Refuse a tokenizer with more ids than the embedding has rows.

    Args:
        path: directory of the checkpoint; one without a tokenizer is fine.
        config: of the model.

    Raises:
        ValueError: it is damaged or does not fit.
    """
    file = path / TOKENIZER
    if not file.is_file():
        return
    values = read_json(file)
    model, added = values.get("model"), values.get("added_tokens") or []
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(vocabulary, dict | list) or not isinstance(added, list):
        raise ValueError(f"{file}: damaged: got no vocabulary, expected model.vocab")
    ids = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
    count = 1 + max([-1, *ids, *(token["id"] for token in added)])
    if count > config.vocab_size:
        raise ValueError(f"{file}: vocabulary: got {count} tokens, expected at most the embedding's rows, vocab_size = {config.vocab_size}")


def copy_companions(source: Path, path: Path) -> None:
    """Copy the tokenizer's files from one directory to another; what a library needs beside `tokenizer.json` is added."""
    for name in COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, path / name)
    if (path / TOKENIZER).is_file() and not (path / TOKENIZER_CONFIG).is_file():
        config = read_config(path)
        names = {token["id"]: token["content"] for token in read_json(path / TOKENIZER)["added_tokens"]}  # type: ignore[index,attr-defined]
        bos, eos = names.get(config.bos_token_id), names.get(config.eos_token_id)
        values = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": eos, "pad_token": eos}
        write_json(path / TOKENIZER_CONFIG, values | {"model_max_length": config.max_position_embeddings})


def write_json(path: Path, values: object) -> None:
    """Write a JSON file as the release's are written."""
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, object]:
    """Read a JSON file that holds an object.

    Raises:
        ValueError: it does not, or is damaged.
        FileNotFoundError: there is none.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: damaged: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: damaged: got {type(values).__name__}, expected an object")
    return values


def _release_keys(values: dict[str, Any]) -> dict[str, Any]:
    """Translate what transformers writes into the release's keys; those of the release stay as they are.

    Raises:
        ValueError: a value that has no counterpart.
    """
    values = dict(values)
    rope = _object(values.pop("rope_parameters", None))
    if values.get("model_type") == "deepseek_v4" and "compress_ratios" not in values and "layer_types" in values:
        main, rope = _object(rope.get("main")), _object(rope.get("compress"))
        values |= _v4_layers(values) | {"compress_rope_theta": rope.get("rope_theta")}
        values |= {key: value for key, value in main.items() if key == "rope_theta"}
    elif "rope_theta" in rope:
        values["rope_theta"] = rope["rope_theta"]
    scaling = rope or values.get("rope_scaling")
    if isinstance(scaling, dict):
        kind = scaling.get("type", scaling.get("rope_type", "yarn"))
        if scaling.get("attention_factor", 1.0) != 1.0:
            raise ValueError(f"rope_parameters: got attention_factor {scaling['attention_factor']}, expected 1.0")
        values["rope_scaling"] = {"type": "yarn", "factor": 1.0} if kind == "default" else scaling | {"type": kind}
    return values


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _v4_layers(values: dict[str, Any]) -> dict[str, Any]:
    count, rates = values.get("num_hidden_layers"), _object(values.get("compress_rates"))
    kinds: Any = values["layer_types"]
    networks: Any = values.get("mlp_layer_types")
    for name, found in (("layer_types", kinds), ("mlp_layer_types", networks)):
        if not isinstance(found, list) or len(found) != count:
            got = f"{len(found)} entries" if isinstance(found, list) else repr(found)
            raise ValueError(f"{name}: got {got}, expected num_hidden_layers = {count}")
    if strange := {kind: rate for kind, rate in rates.items() if RATIOS.get(kind) != rate}:
        raise ValueError(f"compress_rates: got {strange}, expected {RATIOS}")
    if strangers := [kind for kind in kinds if kind not in RATIOS]:
        raise ValueError(f"layer_types: got {strangers[0]!r}, expected one of {', '.join(RATIOS)}")
    hashed = networks.count("hash_moe")
    if networks != ["hash_moe"] * hashed + ["moe"] * (len(kinds) - hashed):
        raise ValueError(f"mlp_layer_types: got {networks}, expected hash_moe first, then moe")
    made = {"compress_ratios": [RATIOS[kind] for kind in kinds], "num_hash_layers": hashed}
    if values.get("num_nextn_predict_layers", 1) == 1:
        made["compress_ratios"].append(0)
    if "qk_rope_head_dim" not in values and isinstance(share := values.get("partial_rotary_factor"), int | float):
        made["qk_rope_head_dim"] = round(values.get("head_dim", 0) * share)
    return made


def _transformers_keys(config: AnyConfig, values: dict[str, Any]) -> dict[str, Any]:
    """Translate the release's keys into those that transformers' own `save_pretrained` writes."""
    scaling = values.pop("rope_scaling")
    yarn = {"rope_type": scaling.pop("type"), **scaling}
    values["dtype"] = values.pop("torch_dtype")
    if not isinstance(config, ModelConfig):
        values["mlp_layer_types"] = [
            "dense" if layer < config.first_k_dense_replace else "sparse" for layer in range(config.num_hidden_layers)
        ]
        return values | {"rope_parameters": {**yarn, "rope_theta": config.rope_theta}}
    kinds = {ratio: kind for kind, ratio in RATIOS.items()}
    ratios, hashed = values.pop("compress_ratios"), values.pop("num_hash_layers")
    share = config.qk_rope_head_dim / config.head_dim
    compress = {**yarn, "attention_factor": 1.0, "rope_theta": config.compress_rope_theta, "partial_rotary_factor": share}
    if scaling["factor"] == 1.0:
        compress = {"rope_type": "default", "rope_theta": config.compress_rope_theta, "partial_rotary_factor": share}
    return values | {
        "layer_types": [kinds[ratio] for ratio in ratios[: config.num_hidden_layers]],
        "mlp_layer_types": ["hash_moe"] * hashed + ["moe"] * (config.num_hidden_layers - hashed),
        "compress_rates": {kind: ratio for kind, ratio in RATIOS.items() if ratio},
        "partial_rotary_factor": share,
        "rope_parameters": {
            "main": {"rope_type": "default", "rope_theta": config.rope_theta, "partial_rotary_factor": share},
            "compress": compress,
        },
    }
