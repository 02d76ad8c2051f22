"""Routing, balance, MTP against a few dense lines, initialisation, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from model.transformer import Transformer
from tiny_models import FEW_WORDS

CONFIG = replace(FEW_WORDS, vocab_size=50, index_n_heads=16, index_head_dim=8, index_topk=4, n_routed_experts=6, initializer_range=0.1)


def _norm(x: torch.Tensor, weight: torch.Tensor | float = 1.0) -> torch.Tensor:
    return weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


def _turn(x: torch.Tensor, sign: int) -> torch.Tensor:
    angle = sign * torch.arange(len(x))[:, None] * 10000.0 ** (-torch.arange(0, 8, 2) / 8)
    cos, sin = (f(angle).view(len(x), *[1] * (x.ndim - 2), 4) for f in (torch.cos, torch.sin))
    even, odd = x[..., -8::2], x[..., -7::2]
    return torch.cat([x[..., :-8], torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)], -1)


def _hyper(x: torch.Tensor, block: torch.nn.Module, name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    fn, base, scale = (getattr(block, f"hc_{name}_{part}") for part in ("fn", "base", "scale"))
    mix = _norm(x.flatten(1)) @ fn.T
    pre = torch.sigmoid(mix[:, :4] * scale[0] + base[:4]) + 1e-6
    post = 2 * torch.sigmoid(mix[:, 4:8] * scale[1] + base[4:8])
    comb = (mix[:, 8:] * scale[2] + base[8:]).view(-1, 4, 4).softmax(2) + 1e-6
    comb = comb / (comb.sum(1, keepdim=True) + 1e-6)
    for _ in range(19):
        comb = comb / (comb.sum(2, keepdim=True) + 1e-6)
        comb = comb / (comb.sum(1, keepdim=True) + 1e-6)
    return (pre[..., None] * x).sum(1), post, comb


def _dense_mtp(model: Transformer, streams: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """MTP of one sample, written again without the model's own modules."""
    block, n, following = model.mtp[0], len(tokens), tokens.roll(-1)
    x = (_norm(model.embed.weight[following], block.enorm.weight) @ block.e_proj.weight.T)[:, None]
    x = x + _norm(streams, block.hnorm.weight) @ block.h_proj.weight.T
    y, post, comb = _hyper(x, block, "attn")
    y, a = _norm(y, block.attn_norm.weight), block.attn
    q = _turn(_norm((_norm(y @ a.wq_a.weight.T, a.q_norm.weight) @ a.wq_b.weight.T).view(n, 2, 16)), 1)
    kv = _turn(_norm(y @ a.wkv.weight.T, a.kv_norm.weight), 1)
    place = torch.arange(n)
    hidden = (place > place[:, None]) | (place <= place[:, None] - 8)
    scores = (torch.einsum("thk,sk->ths", q, kv) / 4).masked_fill(hidden[:, None], float("-inf")).exp()
    o = torch.einsum("ths,sk->thk", scores, kv) / (scores.sum(-1) + a.attn_sink.exp())[..., None]
    o = torch.einsum("tgi,goi->tgo", _turn(o, -1).reshape(n, 2, 16), a.wo_a.weight.view(2, 8, 16)).flatten(1) @ a.wo_b.weight.T
    x = post[..., None] * o[:, None] + torch.einsum("tjk,tjd->tkd", comb, x)
    y, post, comb = _hyper(x, block, "ffn")
    y, f = _norm(y, block.ffn_norm.weight), block.ffn
    s = functional.softplus(y @ f.gate.weight.T).sqrt()
    chosen = torch.zeros_like(s).scatter(1, (s + f.gate.bias).topk(2).indices, 1.0) * s
    share = chosen / chosen.sum(1, keepdim=True) * 1.5
    inner = functional.silu(torch.einsum("td,efd->tef", y, f.experts.w1)) * torch.einsum("td,efd->tef", y, f.experts.w3)
    out = torch.einsum("te,tef,edf->td", share, inner, f.experts.w2)
    e = f.shared_experts
    out = out + (functional.silu(y @ e.w1.weight.T) * (y @ e.w3.weight.T)) @ e.w2.weight.T
    x = post[..., None] * out[:, None] + torch.einsum("tjk,tjd->tkd", comb, x)
    pre = torch.sigmoid(_norm(x.flatten(1)) @ block.hc_head_fn.T * block.hc_head_scale + block.hc_head_base) + 1e-6
    return _norm((pre[..., None] * x).sum(1), block.norm.weight)


def _model(**changes: object) -> Transformer:
    torch.manual_seed(0)
    return Transformer(replace(CONFIG, **changes))


def test_mtp_equals_its_definition_forward_and_backward() -> None:
    model = _model()
    with torch.no_grad():
        for name, p in model.mtp.named_parameters():
            if p.ndim == 1:
                p.normal_(1 if "norm" in name else 0, 0.3)
    tokens, cu = torch.randint(50, (21,)), torch.tensor([0, 21])
    streams = model(tokens, cu).streams.detach()
    hidden = model(tokens, cu)._replace(streams=streams)
    got, expected = model.mtp_hidden(hidden, tokens, cu), _dense_mtp(model, streams, tokens)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)
    names, parameters = zip(*model.mtp.named_parameters())
    weight = torch.randn_like(got)
    for name, ours, theirs in zip(
        names, torch.autograd.grad((got * weight).sum(), parameters), torch.autograd.grad((expected * weight).sum(), parameters)
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


def test_balance_loss_is_one_when_balanced_and_grows_with_imbalance() -> None:
    gate = _model().layers[2].ffn.gate
    model = _model()
    from model.layout import PackedRow

    row = PackedRow(model.config, torch.tensor([0, 12, 18]), 18)
    indices = (torch.arange(18)[:, None] * 2 + torch.arange(2)) % 6
    torch.testing.assert_close(gate.balance_loss(indices, torch.ones(18, 6), row), torch.tensor(1.0))
    skewed = torch.ones(18, 6)
    skewed[:, :2] = 4.0
    assert gate.balance_loss(torch.tensor([[0, 1]]).expand(18, 2), skewed, row) > 1.5


def test_balance_loss_follows_its_equation_sample_by_sample() -> None:
    model = _model()
    tokens, cu = torch.randint(50, (30,)), torch.tensor([0, 11, 30])
    seen = []
    for layer in (1, 2):
        model.layers[layer].ffn.gate.register_forward_hook(lambda m, i, out: seen.append(out))
    got = model(tokens, cu).balance_loss
    expected = torch.zeros(())
    for indices, _, scores in seen:
        for low, high in ((0, 11), (11, 30)):
            f = torch.bincount(indices[low:high].flatten(), minlength=6) * 6 / (2 * (high - low))
            p = (scores / scores.sum(1, keepdim=True))[low:high].mean(0)
            expected = expected + (f * p).sum() * (high - low) / 30
    torch.testing.assert_close(got, expected)


def test_router_bias_follows_the_loads_and_forgets_them() -> None:
    model = _model()
    tokens, cu = torch.randint(50, (40,)), torch.tensor([0, 40])
    with torch.no_grad():
        model(tokens, cu)
    assert not model.router_load().any()
    model(tokens, cu)
    load = model.router_load()
    assert load.shape == (4, 6) and (load.sum(1)[:3] == 80).all() and load[3].sum() == 0
    model.update_router_bias(0.001)
    torch.testing.assert_close(model.layers[2].ffn.gate.bias, 0.001 * torch.sign(load[2].mean() - load[2]))
    assert not model.router_load().any() and model.layers[0].ffn.gate.bias is None
    model.update_router_bias(0.001, load)
    torch.testing.assert_close(model.layers[2].ffn.gate.bias, 0.002 * torch.sign(load[2].mean() - load[2]))


def test_hash_tables_are_fixed_and_distinct() -> None:
    table = _model().layers[0].ffn.gate.tid2eid
    torch.manual_seed(99)
    assert torch.equal(table, Transformer(CONFIG).layers[0].ffn.gate.tid2eid)
    assert (table.sort(1).values.diff(dim=1) > 0).all() and table.min() >= 0 and table.max() < 6


def test_a_fresh_model_learns() -> None:
    model = _model(initializer_range=0.02)
    tokens, cu = torch.arange(48) % 12, torch.tensor([0, 24, 48])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    for _ in range(40):
        loss = functional.cross_entropy(model.head(model(tokens, cu).last)[:-1], tokens[1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.3


def test_the_head_hands_its_weight_to_a_loss() -> None:
    head = _model().head
    hidden = torch.randn(5, 32)
    assert torch.equal(head(hidden, lambda h, w: h @ w.T), head(hidden)) and head(hidden).dtype == torch.float32


@pytest.mark.parametrize(
    ("field", "value"),
    [("compress_ratios", [0, 4]), ("compress_ratios", [0, 8, 128, 0]), ("o_groups", 3), ("num_experts_per_tok", 7), ("sliding_window", 0)],
    ids=str,
)
def test_a_contradictory_config_is_refused(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        _model(**{field: value})
