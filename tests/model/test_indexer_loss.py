"""The indexer's loss is the divergence of its scores from what the attention spends on the entries."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model.config import ModelConfig, V32Config
from model.kernels.indexer.loss import IndexScores, indexer_loss
from model.kernels.sparse_attention.blocked import Inputs
from model.layout import PackedRow
from model.transformer import Transformer

CONFIG = ModelConfig(
    num_hidden_layers=2, compress_ratios=[4, 128], num_nextn_predict_layers=0, head_dim=16, qk_rope_head_dim=8, sliding_window=24
)
HEADS, INDEX_HEADS, INDEX_WIDTH = 3, 5, 8


def _case(lengths: list[int], *, selects: int) -> tuple[IndexScores, Inputs]:
    total = sum(lengths)
    row = PackedRow(CONFIG, torch.tensor([0, *lengths]).cumsum(0), total)
    entries = row.entries[4]
    q, kv, ckv = torch.randn(total, HEADS, 16) * 2, torch.randn(total, 16), torch.randn(len(entries.first), 16)
    indices = None
    if selects:
        order = torch.rand(total, entries.most).masked_fill(torch.arange(entries.most) >= entries.visible[:, None], -1)
        best = order.topk(min(selects, entries.most), -1)
        indices = torch.where(best.values >= 0, best.indices, -1)
    scores = IndexScores(
        torch.randn(total, INDEX_HEADS, INDEX_WIDTH).requires_grad_(),
        torch.randn(len(entries.first), INDEX_WIDTH).requires_grad_(),
        torch.randn(total, INDEX_HEADS).requires_grad_(),
    )
    return scores, Inputs(q, kv, ckv, torch.randn(HEADS), indices, row, 4)


def _plain(scores: IndexScores, attention: Inputs) -> Tensor:
    """One query at a time, straight from the definition."""
    row, divergences = attention.row, []
    assert attention.ckv is not None
    for t in range(row.length):
        base, visible = int(row.entries[4].base[t]), int(row.entries[4].visible[t])
        chosen = torch.arange(visible) if attention.indices is None else attention.indices[t][attention.indices[t] >= 0].sort().values
        if len(chosen) == 0:
            continue
        first = max(int(row.cu_seqlens[row.sample[t]]), t - row.window + 1)
        keys = torch.cat([attention.kv[first : t + 1], attention.ckv[base + chosen]])
        logits = torch.cat([attention.q[t] @ keys.T / 4, attention.sink[:, None]], 1)
        mass = logits.softmax(-1)[:, t + 1 - first : -1].sum(0)
        index = (scores.q[t] @ scores.keys[base + chosen].T).relu().T @ scores.weights[t]
        divergences.append(torch.nn.functional.kl_div(index.log_softmax(0), mass / mass.sum(), reduction="sum"))
    return torch.stack(divergences).mean()


@pytest.mark.parametrize("selects", [0, 3], ids=["dense", "selected"])
@pytest.mark.parametrize("lengths", [[70], [3, 50, 9, 41], [4]], ids=str)
def test_the_loss_and_its_gradients_equal_the_definition(lengths, selects):
    torch.manual_seed(len(lengths) + selects)
    scores, attention = _case(lengths, selects=selects)
    got, expected = indexer_loss(scores, attention), _plain(scores, attention)
    torch.testing.assert_close(got, expected)
    for ours, theirs in zip(torch.autograd.grad(got, scores), torch.autograd.grad(expected, scores), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


def test_no_entry_no_loss():
    scores, attention = _case([3, 2], selects=0)
    assert float(indexer_loss(scores, attention)) == 0


def test_following_the_gradient_makes_the_scores_match_the_attention():
    torch.manual_seed(5)
    scores, attention = _case([60], selects=0)
    optimizer = torch.optim.Adam(scores, lr=0.05)
    losses = []
    for _ in range(200):
        optimizer.zero_grad()
        loss = indexer_loss(scores, attention)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.parametrize("indexer", ["dense", "sparse"])
def test_the_loss_of_a_model_trains_its_indexers_and_nothing_else(indexer):
    torch.manual_seed(8)
    model = Transformer(
        replace(
            CONFIG, vocab_size=50, hidden_size=24, num_attention_heads=2, q_lora_rank=12, o_groups=1, o_lora_rank=8, index_n_heads=4,
            index_head_dim=8, index_topk=5, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, num_hash_layers=0,
            initializer_range=0.3,
        )
    )  # fmt: skip
    model.requires_grad_(True)
    tokens, cu = torch.randint(50, (90,)), torch.tensor([0, 60, 90])
    hidden = model(tokens, cu, indexer=indexer)
    hidden.indexer_loss.backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.abs().max() > 0)}
    assert moved and all(".indexer." in name for name in moved)
    assert {name.split(".indexer.")[1] for name in moved} >= {"wq_b.weight", "weights_proj.weight", "compressor.wkv.weight"}
    selects_all = torch.equal(hidden.last, model(tokens, cu).last)
    assert selects_all == (indexer == "sparse")
    assert model(tokens, cu).indexer_loss is None


V4 = replace(
    CONFIG, vocab_size=40, hidden_size=32, compress_ratios=[4, 4], num_attention_heads=2, head_dim=32, q_lora_rank=24, o_groups=1,
    o_lora_rank=16, sliding_window=8, index_n_heads=8, index_head_dim=16, index_topk=6, n_routed_experts=4, num_experts_per_tok=2,
    moe_intermediate_size=16, num_hash_layers=0, initializer_range=0.3,
)  # fmt: skip
V32 = V32Config(
    vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=16,
    qk_rope_head_dim=8, v_head_dim=16, index_n_heads=8, index_head_dim=16, index_topk=12, intermediate_size=32, first_k_dense_replace=1,
    n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1, moe_intermediate_size=16, num_nextn_predict_layers=0,
    initializer_range=0.3,
)  # fmt: skip


@pytest.mark.parametrize("config", [V4, V32], ids=["v4", "v32"])
def test_dense_then_sparse_training_brings_the_indexers_to_the_attention_of_unseen_text(config):
    torch.manual_seed(0)
    model = Transformer(config)
    model.requires_grad_(False)
    with torch.no_grad():
        for layer in model.layers:
            layer.attn.q_norm.weight.mul_(6)  # so that queries look at few entries
    optimizer = torch.optim.Adam([p.requires_grad_() for name, p in model.named_parameters() if ".indexer." in name], lr=0.01)
    cu, generator = torch.tensor([0, 100, 160]), torch.Generator().manual_seed(1)
    unseen = torch.randint(40, (160,), generator=torch.Generator().manual_seed(9))

    def losses() -> dict[str, float]:
        with torch.no_grad():
            return {indexer: float(model(unseen, cu, indexer=indexer).indexer_loss) for indexer in ("dense", "sparse")}

    before = losses()
    for step in range(150):
        optimizer.zero_grad()
        tokens = torch.randint(40, (160,), generator=generator)
        model(tokens, cu, indexer="dense" if step < 110 else "sparse").indexer_loss.backward()
        optimizer.step()
    after = losses()
    assert after["dense"] < 0.25 * before["dense"] and after["sparse"] < 0.25 * before["sparse"], (before, after)
