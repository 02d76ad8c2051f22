"""V3.2's packed rows, latent cache, routing and indexer, beside what transformers can say."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from model.cache import Cache
from model.transformer import Transformer
from tiny_models import V32, lively


def test_decode_equals_forward_where_nothing_is_left_out() -> None:
    model = lively(replace(V32, index_topk=1000), 3)
    tokens, cu = torch.randint(97, (160,)), torch.tensor([0, 100, 160])
    full = model(tokens, cu).last.detach()
    cache = Cache(model.config, rows=2, capacity=100)
    model.prefill(torch.cat([tokens[:50], tokens[100:110]]), torch.tensor([0, 50, 60]), cache)
    for _ in range(50):
        place = cu[:-1] + cache.positions
        torch.testing.assert_close(model.decode(tokens[place], cache), full[place], atol=1e-4, rtol=0)


def test_the_cache_keeps_a_latent_a_rotated_key_and_an_index_key_a_token() -> None:
    cache = Cache(V32, rows=2, capacity=50, dtype=torch.bfloat16)
    assert all(layer.compressor is None and layer.indexer is None for layer in cache.layers)
    longer = Cache(V32, rows=2, capacity=51, dtype=torch.bfloat16)

    def size(of: Cache) -> int:
        return sum(t.nbytes for layer in of.layers for t in (layer.keys, layer.index_keys) if t is not None)

    a_token = V32.kv_lora_rank + V32.qk_rope_head_dim + V32.index_head_dim
    assert size(longer) - size(cache) == 2 * V32.num_hidden_layers * a_token * 2


def test_only_scored_layers_have_routers() -> None:
    model, tokens = lively(V32, 3), torch.randint(97, (50,))
    model(tokens, torch.tensor([0, 20, 50]))
    load = model.router_load()
    assert load.shape == (2, 8) and (load.sum(1) == 2 * 50).all()
    before = model.layers[2].ffn.gate.bias.clone()
    model.update_router_bias(0.001)
    assert torch.equal(model.layers[2].ffn.gate.bias, before + 0.001 * torch.sign(load[1].mean() - load[1]))
    assert not model.router_load().any()


def test_experts_come_from_the_best_groups_only() -> None:
    gate = lively(V32, 0).layers[1].ffn.gate
    x = torch.randn(50, V32.hidden_size)
    gate.bias.normal_(0, 0.2)
    indices, weights, scores = gate(x, torch.zeros(50, dtype=torch.int64))
    choice = (scores + gate.bias).view(50, 4, 2)
    best = choice.sum(2).argsort(1, descending=True)[:, :2]  # groups of two: both count
    assert (indices // 2).unsqueeze(2).eq(best.unsqueeze(1)).any(2).all()
    unlimited = (scores + gate.bias).topk(2).indices
    assert (indices.sort(1).values != unlimited.sort(1).values).any()
    torch.testing.assert_close(weights.sum(1), torch.full((50,), 2.5))


def test_the_indexer_selects_tokens_up_to_the_query_and_gets_no_gradient() -> None:
    model, tokens = lively(V32, 6), torch.randint(97, (200,))
    indices = []
    hooks = [layer.attn.indexer.register_forward_hook(lambda m, i, out: indices.append(out)) for layer in model.layers]
    model(tokens, torch.tensor([0, 200])).last.sum().backward()
    for hook in hooks:
        hook.remove()
    assert all(p.grad is None for name, p in model.named_parameters() if ".indexer." in name)
    assert all(i.shape == (200, 24) and (i <= torch.arange(200)[:, None]).all() for i in indices)
    seen = (indices[0] >= 0).sum(1)
    assert torch.equal(seen, torch.arange(1, 201).clamp(max=24))


@pytest.mark.parametrize("mode", ["dense", "sparse"])
def test_the_indexer_learns_from_the_attention_alone(mode: str) -> None:
    model, tokens, cu = lively(V32, 2), torch.randint(97, (90,)), torch.tensor([0, 60, 90])
    indexers = {name: p.requires_grad_() for name, p in model.named_parameters() if ".indexer." in name}
    optimizer, losses = torch.optim.AdamW(indexers.values(), lr=3e-3), []
    for _ in range(12):
        optimizer.zero_grad()
        loss = model(tokens, cu, indexer=mode).indexer_loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert all(p.grad is not None for p in indexers.values())
    assert all(p.grad is None for name, p in model.named_parameters() if name not in indexers)
    assert losses[-1] < 0.9 * losses[0]


def test_a_fresh_model_learns() -> None:
    torch.manual_seed(0)
    model = Transformer(replace(V32, initializer_range=0.02))
    tokens, cu = torch.arange(48) % 12, torch.tensor([0, 24, 48])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    for _ in range(60):
        loss = functional.cross_entropy(model.head(model(tokens, cu).last)[:-1], tokens[1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.3
