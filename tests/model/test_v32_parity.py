"""V3.2 equals transformers' implementation with the same weights: logits, gradients, selection, group-limited routing."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from torch.nn import functional
from transformers import DeepseekV32Config, DeepseekV32ForCausalLM

from model.config import V32Config, V32RopeScaling
from model.transformer import Transformer
from tiny_models import V32, lively

LENGTHS = (1, 3, 7, 127, 128, 129, 130, 131, 301)
BASE = replace(V32, vocab_size=99, num_hidden_layers=4, index_topk=20)
VARIANTS = {
    "every token selected": {"index_topk": 400},
    "one token selected": {"index_topk": 1},
    "no temperature": {"rope_scaling": V32RopeScaling(mscale=0.0, mscale_all_dim=0.0)},
    "no yarn": {"rope_scaling": V32RopeScaling(factor=1.0)},
    "no groups": {"n_group": 1, "topk_group": 1},
    "one group of many": {"n_group": 2, "topk_group": 1},
    "all experts": {"num_experts_per_tok": 4},
    "two shared experts": {"n_shared_experts": 2},
    "dense throughout": {"first_k_dense_replace": 4},
    "experts throughout": {"first_k_dense_replace": 0},
    "weights as they are": {"norm_topk_prob": False},
}

RENAMES = [
    ("embed.weight", "model.embed_tokens.weight"),
    ("head.weight", "lm_head.weight"),
    ("attn_norm", "input_layernorm"),
    ("ffn_norm", "post_attention_layernorm"),
    (".attn.indexer.", ".self_attn.INDEXER."),
    (".attn.wq_a", ".self_attn.q_a_proj"),
    (".attn.q_norm", ".self_attn.q_a_layernorm"),
    (".attn.wq_b", ".self_attn.q_b_proj"),
    (".attn.wkv_a", ".self_attn.kv_a_proj_with_mqa"),
    (".attn.kv_norm", ".self_attn.kv_a_layernorm"),
    (".attn.wkv_b", ".self_attn.kv_b_proj"),
    (".attn.wo", ".self_attn.o_proj"),
    (".ffn.", ".mlp."),
    (".w1.", ".gate_proj."),
    (".w2.", ".down_proj."),
    (".w3.", ".up_proj."),
    ("gate.bias", "gate.e_score_correction_bias"),
    ("INDEXER", "indexer"),
]


def oracle_name(name: str) -> str:
    for ours, theirs in RENAMES:
        name = name.replace(ours, theirs)
    return name if name.startswith(("model.", "lm_head.")) else f"model.{name}"


def oracle_tensors(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    mapped = {}
    for name, value in tensors.items():
        if name.endswith(".experts.w1"):
            mapped[oracle_name(name.replace("experts.w1", "experts.gate_up_proj"))] = torch.cat([value, tensors[name[:-1] + "3"]], 1)
        elif name.endswith(".experts.w2"):
            mapped[oracle_name(name.replace("experts.w2", "experts.down_proj"))] = value
        elif not name.endswith(".experts.w3"):
            mapped[oracle_name(name)] = value
    return mapped


def oracle_config(config: V32Config) -> DeepseekV32Config:
    values = {name: value for name, value in config.to_dict().items() if name in {f.name for f in fields(DeepseekV32Config)}}
    scaling = config.to_dict()["rope_scaling"]
    rope = {"rope_type": scaling.pop("type"), "rope_theta": config.rope_theta, **scaling}
    if not scaling["mscale"]:
        rope["attention_factor"] = 1.0
    if scaling["factor"] == 1.0:
        rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    values["num_key_value_heads"] = config.num_attention_heads
    return DeepseekV32Config(**values, rope_parameters=rope, attn_implementation="eager")


def pair(config: V32Config, seed: int) -> tuple[Transformer, DeepseekV32ForCausalLM]:
    """Two models with the same lively weights."""
    ours = lively(config, seed)
    theirs = DeepseekV32ForCausalLM(oracle_config(config)).eval()
    result = theirs.load_state_dict(oracle_tensors(ours.state_dict()), strict=False)
    assert not result.unexpected_keys and all("inv_freq" in key for key in result.missing_keys), result
    return ours, theirs


def whole(length: int) -> torch.Tensor:
    return torch.tensor([0, length])


@torch.no_grad()
def assert_same_logits(config: V32Config, seed: int, lengths: tuple[int, ...]) -> None:
    ours, theirs = pair(config, seed)
    for length in lengths:
        tokens = torch.randint(config.vocab_size, (length,))
        logits = ours.head(ours(tokens, whole(length)).last)
        torch.testing.assert_close(logits, theirs(tokens[None]).logits[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("seed", range(3))
def test_logits_equal_the_oracle_at_every_length(seed: int) -> None:
    assert_same_logits(BASE, seed, LENGTHS)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_logits_equal_the_oracle_for_every_variant(changes: dict[str, object]) -> None:
    assert_same_logits(replace(BASE, **changes), 7, (7, 130))


@pytest.mark.parametrize("length", [7, 131, 301])
def test_gradients_equal_the_oracle(length: int) -> None:
    ours, theirs = pair(BASE, 11)
    tokens = torch.randint(BASE.vocab_size, (length,))
    for model, logits in ((ours, ours.head(ours(tokens, whole(length)).last)), (theirs, theirs(tokens[None]).logits[0])):
        model.zero_grad()
        functional.cross_entropy(logits[:-1], tokens[1:]).backward()
    gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in ours.named_parameters()}
    mapped = oracle_tensors(gradients)
    for name, parameter in theirs.named_parameters():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        scale = max(float(expected.abs().max()), 1e-3)
        torch.testing.assert_close(mapped[name] / scale, expected / scale, atol=1e-4, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
