"""A model small enough that a whole training step takes milliseconds, with every kind of layer."""

from dataclasses import replace

import pytest

from experts.fresh import write_fresh_model
from model.config import V32Config
from model.tokenizer import Tokenizer
from tiny_models import FEW_WORDS


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    """A freshly initialised model and its tokenizer on disk."""
    config = replace(
        FEW_WORDS, vocab_size=300, o_lora_rank=16, sliding_window=16, index_n_heads=16, index_topk=4, moe_intermediate_size=32,
        hc_sinkhorn_iters=4, initializer_range=0.1,
    )  # fmt: skip
    return _fresh(tmp_path_factory.mktemp("model") / "fresh", config)


@pytest.fixture(scope="session")
def v32_dir(tmp_path_factory):
    """The same of a V3.2, whose indexer selects."""
    config = V32Config(
        vocab_size=300,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=16,
        index_n_heads=16,
        index_head_dim=16,
        index_topk=24,
        intermediate_size=64,
        first_k_dense_replace=1,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        moe_intermediate_size=32,
        num_nextn_predict_layers=0,
        initializer_range=0.1,
    )
    return _fresh(tmp_path_factory.mktemp("v32") / "fresh", config)


def _fresh(directory, config):
    tokenizer = Tokenizer.train(["Ada has 3 coins, finds 4. 3+4=7."] * 5, 300, boilerplate=[])
    write_fresh_model(directory, config, tokenizer, seed=0)
    return directory
