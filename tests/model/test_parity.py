"""The model equals transformers' DeepSeek-V4 with the same weights: logits, losses' gradients, every kind of layer."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from torch.nn import functional
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

from model.config import ModelConfig
from model.transformer import Transformer
from tiny_models import V4, lively

LENGTHS = (1, 3, 7, 127, 128, 129, 130, 131, 301)
ONE_KIND = {
    "sliding_window": [0, 0],
    "csa": [4, 0],
    "hca": [128, 0],
}


def oracle_config(config: ModelConfig) -> DeepseekV4Config:
    rope = {"rope_type": "yarn", **{k: v for k, v in config.to_dict()["rope_scaling"].items() if k != "type"}}
    shared = {f.name for f in fields(ModelConfig)} & (set(DeepseekV4Config.__dataclass_fields__) | {"num_hash_layers", "qk_rope_head_dim"})
    values = {name: getattr(config, name) for name in shared - {"model_type"}}
    ratios = config.compress_ratios[: config.num_hidden_layers]
    return DeepseekV4Config(**values, compress_ratios=ratios, rope_parameters=rope, attn_implementation="eager")


RENAMES = [
    ("embed.weight", "model.embed_tokens.weight"),
    ("head.weight", "lm_head.weight"),
    ("hc_head_", "model.hc_head.hc_"),
    ("hc_attn_", "attn_hc."),
    ("hc_ffn_", "ffn_hc."),
    ("attn.attn_sink", "self_attn.sinks"),
    ("attn_norm", "input_layernorm"),
    ("ffn_norm", "post_attention_layernorm"),
    ("attn.indexer.compressor.", "self_attn.compressor.indexer."),
    ("attn.indexer.weights_proj", "self_attn.compressor.indexer.scorer.weights_proj"),
    ("attn.indexer.wq_b", "self_attn.compressor.indexer.q_b_proj"),
    (".attn.", ".self_attn."),
    (".ffn.", ".mlp."),
    ("shared_experts.w1", "shared_experts.gate_proj"),
    ("shared_experts.w2", "shared_experts.down_proj"),
    ("shared_experts.w3", "shared_experts.up_proj"),
    ("gate.bias", "gate.e_score_correction_bias"),
    ("wq_a", "q_a_proj"),
    ("q_norm", "q_a_norm"),
    ("wq_b", "q_b_proj"),
    ("wo_a", "o_a_proj"),
    ("wo_b", "o_b_proj"),
    ("wkv", "kv_proj"),
    ("wgate", "gate_proj"),
    ("ape", "position_bias"),
]


def oracle_name(name: str) -> str:
    for ours, theirs in RENAMES:
        if ours == "wkv" and ".shared" in name:
            continue
        if ours in name:
            name = name.replace(ours, theirs, 1)
    if ".compressor." in name and name.endswith(".norm.weight"):
        name = name.replace(".norm.weight", ".kv_norm.weight")
    return name if name.startswith(("model.", "lm_head.")) else f"model.{name}"


def oracle_tensors(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    mapped = {}
    for name, value in tensors.items():
        if name.startswith("mtp.") or name.endswith("experts.w3"):
            continue
        if name.endswith(".experts.w1"):
            mapped[oracle_name(name.replace("experts.w1", "experts.gate_up_proj"))] = torch.cat([value, tensors[name[:-1] + "3"]], 1)
        elif name.endswith(".experts.w2"):
            mapped[oracle_name(name.replace("experts.w2", "experts.down_proj"))] = value
        else:
            mapped[oracle_name(name)] = value
    return mapped


def pair(config: ModelConfig, seed: int) -> tuple[Transformer, DeepseekV4ForCausalLM]:
    """Two models with the same lively weights."""
    ours = lively(config, seed)
    theirs = DeepseekV4ForCausalLM(oracle_config(config)).eval()
    mapped = oracle_tensors(ours.state_dict())
    result = theirs.load_state_dict(mapped, strict=False)
    assert not result.unexpected_keys and all("inv_freq" in k for k in result.missing_keys), result
    return ours, theirs


def whole(length: int) -> torch.Tensor:
    return torch.tensor([0, length])


@pytest.mark.parametrize("seed", range(3))
def test_logits_equal_the_oracle_at_every_length(seed: int) -> None:
    ours, theirs = pair(V4, seed)
    with torch.no_grad():
        for length in LENGTHS:
            tokens = torch.randint(V4.vocab_size, (length,))
            logits = ours.head(ours(tokens, whole(length)).last)
            torch.testing.assert_close(logits, theirs(tokens[None]).logits[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("hashed", [0, 1], ids=["scored", "hash"])
@pytest.mark.parametrize("ratios", ONE_KIND.values(), ids=ONE_KIND.keys())
def test_logits_equal_the_oracle_for_every_kind_of_layer(ratios: list[int], hashed: int) -> None:
    config = replace(V4, num_hidden_layers=1, compress_ratios=ratios, num_hash_layers=hashed)
    ours, theirs = pair(config, 7)
    with torch.no_grad():
        for length in (7, 128, 301):
            tokens = torch.randint(config.vocab_size, (length,))
            logits = ours.head(ours(tokens, whole(length)).last)
            torch.testing.assert_close(logits, theirs(tokens[None]).logits[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("length", [7, 131, 301])
def test_gradients_equal_the_oracle(length: int) -> None:
    ours, theirs = pair(V4, 11)
    tokens = torch.randint(V4.vocab_size, (length,))
    for model, logits in ((ours, ours.head(ours(tokens, whole(length)).last)), (theirs, theirs(tokens[None]).logits[0])):
        model.zero_grad()
        functional.cross_entropy(logits[:-1], tokens[1:]).backward()
    gradients = {name: p.grad for name, p in ours.named_parameters() if not name.startswith("mtp.")}
    zeros = {name: torch.zeros_like(p) for name, p in ours.named_parameters()}
    mapped = oracle_tensors({name: zeros[name] if g is None else g for name, g in gradients.items()})
    for name, parameter in theirs.named_parameters():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        scale = max(float(expected.abs().max()), 1e-3)
        torch.testing.assert_close(mapped[name] / scale, expected / scale, atol=1e-4, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
