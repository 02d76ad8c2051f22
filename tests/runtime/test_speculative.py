"""Speculative sampling changes nothing about what is sampled."""

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from domains.types import Prompt
from model import drafting
from model.cache import Cache
from model.transformer import Transformer
from runtime.config import SamplingConfig
from runtime.generation.rows import Row
from runtime.generation.sampler import choose, uniforms
from runtime.generation.speculative import DRAWS, decode_speculatively, verify
from tiny_models import FEW_WORDS


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 9), st.integers(0, 10**6), st.sampled_from([0.3, 1.0, 2.0]), st.sampled_from([0.0, 0.5, 3.0]))
def test_the_token_is_distributed_as_the_model_whatever_the_draft(vocabulary, seed, temperature, apart):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(vocabulary, generator=generator) * 2
    draft_logits = logits + apart * torch.randn(vocabulary, generator=generator)
    grid = (torch.arange(120) + 0.5) / 120
    q = torch.softmax(draft_logits / temperature, -1)
    found = torch.zeros(vocabulary)
    accept, anew = (x.flatten() for x in torch.meshgrid(grid, grid, indexing="ij"))  # every pair of draws, evenly
    for draft in range(vocabulary):
        rows = len(accept)
        verdicts = verify(
            logits.expand(rows, -1), draft_logits.expand(rows, -1), torch.full((rows,), draft), torch.stack([accept, anew], 1), temperature
        )
        found += q[draft] * torch.bincount(verdicts.tokens, minlength=vocabulary) / rows
    torch.testing.assert_close(found, torch.softmax(logits / temperature, -1), atol=0.02, rtol=0)


def test_a_draft_from_the_model_itself_is_always_accepted():
    torch.manual_seed(0)
    logits, draws = torch.randn(200, 7), torch.rand(200, 2)
    drafts, logprobs = choose(logits, torch.rand(200), 0.7)
    verdicts = verify(logits, logits, drafts, draws, 0.7)
    assert bool(verdicts.accepted.all()) and torch.equal(verdicts.tokens, drafts)
    torch.testing.assert_close(verdicts.logprobs, logprobs)


def test_greedy_accepts_the_models_own_choice_alone():
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 0.0]])
    verdicts = verify(logits, torch.zeros(2, 3), torch.tensor([1, 2]), None, 1.0)
    assert verdicts.accepted.tolist() == [True, False] and verdicts.tokens.tolist() == [1, 0]


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_log_probabilities_are_the_models(temperature):
    torch.manual_seed(1)
    logits, drafts = torch.randn(50, 5), torch.randint(5, (50,))
    verdicts = verify(logits, torch.randn(50, 5), drafts, torch.rand(50, 2), temperature)
    expected = torch.log_softmax(logits / temperature, -1).gather(1, verdicts.tokens[:, None])[:, 0]
    torch.testing.assert_close(verdicts.logprobs, expected)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(2)
    return Transformer(FEW_WORDS).eval()


class Ends:
    """Turns of which nothing comes back but, once, a given continuation."""

    def __init__(self, *, tokens, temperature, given=(), limit=200):
        self.sampling = SamplingConfig(max_new_tokens=tokens, temperature=temperature, speculative=True)
        self.tokenizer, self.limit, self.given = SimpleNamespace(eos=5), limit, list(given)

    def end(self, rows):
        for row in rows:
            row.turns += 1
            row.done = row.truncated or not self.given or row.turns > 1 or row.count >= self.sampling.max_new_tokens
            if not row.done:
                row.given.extend(self.given)


def _run(model, prompts, ends, *, seed=0):
    rows = []
    for i, prompt in enumerate(prompts):
        greedy = ends.sampling.temperature == 0
        draws = None if greedy else uniforms(seed, i, DRAWS * ends.sampling.max_new_tokens)
        rows.append(Row(Prompt(f"p{i}", "math", [], {}), list(prompt), draws))
    cache = Cache(FEW_WORDS, rows=len(rows), capacity=ends.limit)
    lengths = torch.tensor([0, *(len(p) for p in prompts)]).cumsum(0)
    hidden = drafting.prefill(model, torch.tensor([t for p in prompts for t in p]), lengths, cache)
    with torch.no_grad():
        decode_speculatively(list(rows), model.head(hidden), model, cache, ends)
    return rows


def _next(model, tokens):
    with torch.no_grad():
        return model.head(model(torch.tensor(tokens), torch.tensor([0, len(tokens)])).last[-1:])[0]


@pytest.mark.parametrize("given", [(), (1, 2, 3), (4,)], ids=str)
def test_greedy_rows_are_what_the_model_alone_decodes(model, given):
    prompts = [[1, 2, 3], [4] * 20, [2], [0, 1, 2, 3, 4, 0, 1]]
    for prompt, row in zip(prompts, _run(model, prompts, Ends(tokens=45, temperature=0, given=given)), strict=True):
        tokens, sampled, queue, turns = list(prompt), 0, [], 0
        while sampled < 45:
            if queue:
                tokens.append(queue.pop(0))
                continue
            tokens.append(int(_next(model, tokens).argmax()))
            sampled += 1
            if tokens[-1] == 5:
                turns += 1
                if not given or turns > 1:
                    break
                queue = list(given)
        assert row.tokens == tokens
        assert 0 <= row.accepted <= row.drafted


def test_sampled_tokens_have_the_models_joint_distribution_and_log_probabilities(model):
    count, tokens = 6000, 3
    rows = _run(model, [[1, 2, 3]] * count, Ends(tokens=tokens, temperature=0.8))
    expected = {}

    def spread(prefix, probability):
        if len(prefix) == tokens or (prefix and prefix[-1] == 5):
            expected[tuple(prefix)] = probability
            return
        for token, p in enumerate(torch.softmax(_next(model, [1, 2, 3, *prefix]) / 0.8, -1).tolist()):
            spread([*prefix, token], probability * p)

    spread([], 1.0)
    found = Counter(tuple(row.tokens[3:]) for row in rows)
    assert sum(row.accepted for row in rows) > 0 and sum(row.drafted - row.accepted for row in rows) > 0
    distance = sum((found[key] - count * p) ** 2 / (count * p) for key, p in expected.items() if count * p >= 5)
    free = sum(count * p >= 5 for p in expected.values())
    assert distance < free + 4 * (2 * free) ** 0.5  # four standard deviations of a chi-square
    for row in rows[:20]:
        assert row.sampled == [False] * 3 + [True] * row.count and len(row.tokens) == 3 + row.count
        for place in range(3, len(row.tokens)):
            exact = torch.log_softmax(_next(model, row.tokens[:place]) / 0.8, -1)[row.tokens[place]]
            assert row.logprobs[place] == pytest.approx(float(exact), abs=1e-4)


def test_a_row_does_not_depend_on_its_batch(model):
    prompts = [[1, 2, 3], [3, 2], [0] * 30]
    together = _run(model, prompts, Ends(tokens=30, temperature=1.0), seed=3)
    alone = _run(model, prompts[:1], Ends(tokens=30, temperature=1.0), seed=3)
    assert alone[0].tokens == together[0].tokens


def test_a_model_without_an_mtp_block_is_refused():
    bare = Transformer(replace(FEW_WORDS, num_nextn_predict_layers=0, compress_ratios=[0, 4, 128]))
    with pytest.raises(ValueError, match="no MTP block"):
        drafting.prefill(bare, torch.tensor([1]), torch.tensor([0, 1]), Cache(bare.config, rows=1, capacity=8))
