"""A packed row equals its samples alone, and decoding equals the full forward."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from model.cache import Cache
from model.config import AnyConfig
from model.transformer import Transformer
from tiny_models import V4, V32

CONFIG = replace(V4, vocab_size=97)
LENGTHS = [300, 5, 1, 140, 37]


@pytest.fixture(scope="module", params=[CONFIG, V32], ids=["v4", "v32"])
def model(request: pytest.FixtureRequest) -> Transformer:
    config: AnyConfig = request.param
    torch.manual_seed(3)
    model = Transformer(config)
    with torch.no_grad():  # with equal streams the gradients of the mixing are rounding noise
        for name, parameter in model.named_parameters():
            if name.endswith("_scale"):
                parameter.fill_(1.0)
            elif parameter.ndim == 1 or name.endswith("ape"):
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


@pytest.fixture(scope="module")
def row() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(4)
    cu = torch.tensor([0, *LENGTHS]).cumsum(0)
    return torch.randint(CONFIG.vocab_size, (int(cu[-1]),)), cu


def _loss(model: Transformer, tokens: torch.Tensor, cu: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A loss that is a sum over tokens and reads everything but the meaningless MTP state of each sample's last token."""
    hidden = model(tokens, cu)
    loss = (hidden.last * weight).sum() + hidden.balance_loss * len(tokens)
    if not model.mtp:
        return loss
    ahead = model.mtp_hidden(hidden, tokens, cu)
    meaningful = torch.ones(len(tokens), 1)
    meaningful[cu[1:] - 1] = 0
    return loss + (ahead * weight.flip(1) * meaningful).sum()


def test_a_packed_row_equals_its_samples_alone(model: Transformer, row: tuple[torch.Tensor, torch.Tensor]) -> None:
    tokens, cu = row
    weight = torch.randn(len(tokens), CONFIG.hidden_size)
    model.zero_grad()
    packed = _loss(model, tokens, cu, weight)
    packed.backward()
    together = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    alone = torch.zeros(())
    total = {n: torch.zeros_like(g) for n, g in together.items()}
    size = {n: torch.zeros_like(g) for n, g in together.items()}  # what the samples' gradients cancel from
    for low, high in pairwise(cu):
        model.zero_grad()
        part = _loss(model, tokens[low:high], torch.tensor([0, high - low]), weight[low:high])
        part.backward()
        alone = alone + part.detach()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                total[name] += parameter.grad
                size[name] += parameter.grad.abs()
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-3)
    for name, expected in total.items():
        scale = size[name].max().clamp(min=1e-3)
        torch.testing.assert_close(together[name] / scale, expected / scale, atol=1e-4, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def test_the_last_token_of_a_sample_does_not_leak_into_mtp(model: Transformer, row: tuple[torch.Tensor, torch.Tensor]) -> None:
    if not model.mtp:
        pytest.skip("no MTP block")
    tokens, cu = row
    other = tokens.clone()
    other[cu[1]] = (other[cu[1]] + 1) % CONFIG.vocab_size  # the first token of the second sample
    with torch.no_grad():
        before = model.mtp_hidden(model(tokens, cu), tokens, cu)
        after = model.mtp_hidden(model(other, cu), other, cu)
    torch.testing.assert_close(before[: cu[1] - 1], after[: cu[1] - 1])


@pytest.mark.parametrize("prompts", [[200, 3, 1, 100, 20], [1, 1, 1, 1, 1], [255, 4, 1, 127, 36]], ids=["uneven", "short", "block_ends"])
def test_decode_equals_forward_while_rows_leave(model: Transformer, row: tuple[torch.Tensor, torch.Tensor], prompts: list[int]) -> None:
    tokens, cu = row
    full = model(tokens, cu).last.detach()
    cache = Cache(model.config, rows=len(prompts), capacity=max(LENGTHS))
    starts = torch.cat([tokens[cu[i] : cu[i] + n] for i, n in enumerate(prompts)])
    last = model.prefill(starts, torch.tensor([0, *prompts]).cumsum(0), cache)
    torch.testing.assert_close(last, full[cu[:-1] + torch.tensor(prompts) - 1], atol=1e-4, rtol=0)
    alive, ends = torch.arange(len(prompts)), torch.tensor(LENGTHS)
    while True:
        unfinished = (cache.positions < ends[alive]).nonzero().squeeze(1)
        if len(unfinished) < len(alive):
            cache, alive = cache.select(unfinished), alive[unfinished]
        if not len(alive):
            break
        place = cu[alive] + cache.positions
        torch.testing.assert_close(model.decode(tokens[place], cache), full[place], atol=1e-4, rtol=0)


def test_one_prefilled_prompt_serves_several_samples(model: Transformer) -> None:
    torch.manual_seed(5)
    prompt, turns = torch.randint(97, (70,)), torch.randint(97, (3, 20))
    cache = Cache(model.config, rows=1, capacity=90)
    model.prefill(prompt, torch.tensor([0, 70]), cache)
    cache = cache.select(torch.tensor([0, 0, 0]))
    for step in range(turns.shape[1]):
        got = model.decode(turns[:, step], cache)
    for i, turn in enumerate(turns):
        expected = model(torch.cat([prompt, turn]), torch.tensor([0, 90])).last[-1]
        torch.testing.assert_close(got[i], expected, atol=1e-4, rtol=0)


def test_full_caches_and_wrong_rows_are_refused(model: Transformer) -> None:
    cache = Cache(model.config, rows=2, capacity=4)
    with pytest.raises(ValueError, match="capacity 4"):
        model.prefill(torch.zeros(6, dtype=torch.int64), torch.tensor([0, 1, 6]), cache)
    with pytest.raises(ValueError, match="3 sequences for 2 cache rows"):
        model.prefill(torch.zeros(6, dtype=torch.int64), torch.tensor([0, 1, 2, 6]), cache)
    model.prefill(torch.zeros(5, dtype=torch.int64), torch.tensor([0, 1, 5]), cache)
    with pytest.raises(ValueError, match="row of 5 tokens"):
        model.decode(torch.zeros(2, dtype=torch.int64), cache)
    with pytest.raises(ValueError, match="cu_seqlens"):
        model(torch.zeros(6, dtype=torch.int64), torch.tensor([0, 3]))


def test_samples_that_share_their_beginning_equal_samples_that_do_not(model):
    torch.manual_seed(6)
    tokens, lengths, source, computed = [], [], [], 0
    for prompt, answers in ((150, (30, 1, 170)), (3, (7, 9)), (64, (20,))):
        beginning = torch.randint(CONFIG.vocab_size, (prompt,))
        first = torch.arange(computed, computed + prompt)
        computed += prompt
        for answer in answers:
            tokens += [beginning, torch.randint(CONFIG.vocab_size, (answer,))]
            source += [first, torch.arange(computed, computed + answer)]
            computed += answer
            lengths.append(prompt + answer)
    row, cu, shared = torch.cat(tokens), torch.tensor([0, *lengths]).cumsum(0), torch.cat(source)
    weight = torch.randn(len(row), CONFIG.hidden_size)
    found = []
    for choice in (None, shared):
        model.zero_grad()
        last = model(row, cu, choice).last
        (last * weight).sum().backward()
        found.append((last.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}))
    (alone, gradients), (together, shared_gradients) = found
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)
    assert gradients.keys() == shared_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(shared_gradients[name], gradient, atol=2e-4 * float(gradient.abs().max()) + 1e-5, rtol=1e-3, msg=name)


def test_a_source_that_leaves_a_number_out_is_refused(model):
    with pytest.raises(ValueError, match="source: no token names 1"):
        model(torch.tensor([5, 6, 7]), torch.tensor([0, 3]), torch.tensor([0, 2, 2]))
