"""Quantisation-aware training: the forward pass is on the grids, the gradient reaches the masters, decoding agrees."""

from __future__ import annotations

import pytest
import torch

from model.cache import Cache
from model.config import ModelConfig, V32Config
from model.quant.mxfp4 import dequantize_mxfp4, quantize_mxfp4
from model.transformer import Transformer

CONFIG = ModelConfig(
    vocab_size=60, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, head_dim=32, qk_rope_head_dim=8, q_lora_rank=16,
    o_groups=2, o_lora_rank=8, sliding_window=16, compress_ratios=[0, 4, 128], index_n_heads=8, index_head_dim=16, index_topk=6,
    n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, num_hash_layers=1, initializer_range=0.2,
    num_nextn_predict_layers=0,
)  # fmt: skip
V32 = V32Config(
    vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=8,
    qk_rope_head_dim=8, v_head_dim=8, index_n_heads=2, index_head_dim=16, index_topk=8, intermediate_size=16, first_k_dense_replace=0,
    n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1, moe_intermediate_size=16, num_nextn_predict_layers=0,
)  # fmt: skip


@pytest.fixture
def model() -> Transformer:
    torch.manual_seed(0)
    return Transformer(CONFIG)


def _last(model: Transformer, tokens: torch.Tensor) -> torch.Tensor:
    return model(tokens, torch.tensor([0, len(tokens)])).last


def test_experts_compute_with_what_mxfp4_can_hold(model):
    tokens = torch.randint(60, (90,))
    plain = _last(model, tokens)
    model.quantize(experts=True)
    rounded = _last(model, tokens)
    assert not torch.equal(plain, rounded)
    model.quantize()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".experts.w" in name:
                parameter.copy_(dequantize_mxfp4(*quantize_mxfp4(parameter), dtype=torch.float32))
    torch.testing.assert_close(_last(model, tokens), rounded)


@pytest.mark.parametrize(
    "parts", [{"experts": True}, {"indexer": True}, {"kv": True}, {"experts": True, "indexer": True, "kv": True}], ids=str
)
def test_decoding_equals_the_forward_pass(model, parts):
    model.quantize(**parts)
    tokens = torch.randint(60, (150,))
    expected = _last(model, tokens).detach()
    cache = Cache(CONFIG, rows=1, capacity=160)
    found = [model.prefill(tokens[:70], torch.tensor([0, 70]), cache)]
    found += [model.decode(token[None], cache) for token in tokens[70:]]
    torch.testing.assert_close(torch.cat(found), expected[69:], atol=2e-4, rtol=1e-3)


def test_gradients_go_straight_to_the_masters(model):
    model.quantize(experts=True, kv=True)
    model.head(_last(model, torch.randint(60, (90,)))).square().sum().backward()
    for name, parameter in model.named_parameters():
        if ".indexer." not in name and parameter.requires_grad:
            assert parameter.grad is not None and bool(torch.isfinite(parameter.grad).all()), name
            if ".experts.w" in name:
                assert float(parameter.grad.abs().max()) > 0, name


def test_training_on_the_grid_lowers_the_loss_on_the_grid(model):
    torch.manual_seed(1)
    model.quantize(experts=True, indexer=True, kv=True)
    tokens, cu = torch.randint(60, (64,)), torch.tensor([0, 64])
    optimizer = torch.optim.Adam([p for n, p in model.named_parameters() if ".indexer." not in n], lr=3e-3)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model.head(model(tokens, cu).last[:-1]), tokens[1:])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_grids_that_an_architecture_lacks_are_refused():
    with pytest.raises(ValueError, match="quantize kv: only V4"):
        Transformer(V32).quantize(kv=True)
