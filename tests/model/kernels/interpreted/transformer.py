"""A whole model with Triton kernels against the same one in plain torch: values, gradients, and what a prefill leaves."""

import pytest
import torch

from model.cache import Cache
from model.config import ModelConfig
from model.kernels.choice import choose
from model.transformer import Transformer

CONFIG = ModelConfig(
    vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, head_dim=16, qk_rope_head_dim=8, q_lora_rank=16, o_groups=2,
    o_lora_rank=8, sliding_window=16, compress_ratios=[4, 128, 0], index_n_heads=4, index_head_dim=16, index_topk=6, n_routed_experts=6,
    num_experts_per_tok=2, moe_intermediate_size=24, num_hash_layers=1, hc_sinkhorn_iters=2,
)  # fmt: skip
LENGTHS = (129, 13, 3)
FEW = 4
"""Gradients of fewer numbers are compared together: what nearly cancels in one of them moves by a thousandth in plain torch too, where the
samples of the row change places."""


def model_and_tokens():
    torch.manual_seed(0)
    model = Transformer(CONFIG)
    for name, parameter in model.named_parameters():
        if name.endswith(("fn", "ape", "gate.weight")):
            torch.nn.init.normal_(parameter, 0, 0.5)
    return model, torch.randint(0, 64, (sum(LENGTHS),)), torch.tensor([0, *LENGTHS]).cumsum(0)


@pytest.mark.parametrize("shared", [0, 3], ids=["apart", "shared"])
def test_training(shared):
    model, tokens, cu = model_and_tokens()
    source = None
    if shared:
        tokens[cu[1] : cu[1] + shared] = tokens[cu[2] : cu[2] + shared] = tokens[:shared]
        source = torch.cat([torch.arange(129), torch.arange(3), torch.arange(129, 129 + 10), torch.arange(3)])
    results = []
    for implementation in ("triton", "reference"):
        choose(implementation)
        hidden = model(tokens, cu, source)
        values = [hidden.last, model.router_load()]
        loss = hidden.last.square().sum() + hidden.last.sin().sum()
        if not shared:
            values += [hidden.balance_loss, model.mtp_hidden(hidden, tokens, cu)]
            loss = loss + values[2] + values[3].sin().sum()
        model.update_router_bias(0.0)
        given = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        grads = torch.autograd.grad(loss, [parameter for _, parameter in given], allow_unused=True)
        results.append((values, grads))
    for got, want in zip(results[0][0], results[1][0], strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    pairs = {}
    for (name, _), got, want in zip(given, results[0][1], results[1][1], strict=True):
        assert (got is None) == (want is None), name
        if want is not None:
            pairs.setdefault("the small ones" if want.numel() < FEW else name, []).append((got.flatten(), want.flatten()))
    for name, found in pairs.items():
        got, want = (torch.cat(each) for each in zip(*found, strict=True))
        assert float((got - want).norm()) <= 1e-3 * float(want.norm()) + 1e-6, name


def test_prefill():
    model, tokens, cu = model_and_tokens()
    caches = []
    for implementation in ("triton", "reference"):
        choose(implementation)
        caches.append(Cache(CONFIG, rows=len(LENGTHS), capacity=136))
        last = model.prefill(tokens, cu, caches[-1])
        for layer in caches[-1].layers:
            last = torch.cat([last.flatten(), layer.keys.flatten()])
            for state in (layer.compressor, layer.indexer):
                last = last if state is None else torch.cat([last, state.kv.flatten(), state.gate.flatten()])
        caches.append(last)
    torch.testing.assert_close(caches[1], caches[3], atol=1e-3, rtol=1e-3)
