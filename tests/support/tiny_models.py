"""Architectures small enough that a pass takes milliseconds, with every kind of layer, and models of them without a constant weight."""

from __future__ import annotations

import torch

from model.config import AnyConfig, ModelConfig, V32Config, V32RopeScaling
from model.transformer import Transformer

V4 = ModelConfig(
    vocab_size=99,
    hidden_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    head_dim=32,
    qk_rope_head_dim=8,
    q_lora_rank=24,
    o_groups=2,
    o_lora_rank=16,
    sliding_window=16,
    compress_ratios=[0, 4, 128, 4, 0],
    index_n_heads=16,
    index_head_dim=16,
    index_topk=6,
    n_routed_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=24,
    num_hash_layers=1,
    initializer_range=0.2,
)
V32 = V32Config(
    vocab_size=97,
    hidden_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    q_lora_rank=24,
    kv_lora_rank=20,
    qk_nope_head_dim=12,
    qk_rope_head_dim=8,
    v_head_dim=10,
    intermediate_size=40,
    first_k_dense_replace=1,
    index_n_heads=16,
    index_head_dim=16,
    index_topk=24,
    n_routed_experts=8,
    num_experts_per_tok=2,
    n_group=4,
    topk_group=2,
    moe_intermediate_size=24,
    initializer_range=0.2,
    num_nextn_predict_layers=0,
    rope_scaling=V32RopeScaling(original_max_position_embeddings=64),
)
FEW_WORDS = ModelConfig(
    vocab_size=6,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=2,
    head_dim=16,
    qk_rope_head_dim=8,
    q_lora_rank=16,
    o_groups=2,
    o_lora_rank=8,
    sliding_window=8,
    compress_ratios=[0, 4, 128, 0],
    index_n_heads=4,
    index_head_dim=16,
    index_topk=3,
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    num_hash_layers=1,
    initializer_range=0.4,
)
"""Of so few tokens that samples end and coincide."""
ODD_SIZES = {
    "vocab_size": 97, "o_lora_rank": 20, "index_n_heads": 5, "n_routed_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 28,
}  # fmt: skip
"""What makes of `V4` a model whose sizes are no multiples of tiles and vectors."""


def lively(config: AnyConfig, seed: int = 3) -> Transformer:
    """Make a model in which what initialises to a constant is drawn at random too, so that it counts which parameter is used where."""
    torch.manual_seed(seed)
    model = Transformer(config)
    for name, value in model.state_dict().items():
        if name.endswith("_scale"):
            value.fill_(1.0)
        elif name.endswith("norm.weight"):
            value.normal_(1, 0.1)
        elif name.endswith(("sink", "ape", "_base", "bias")):
            value.normal_(0, 0.3)
    return model
