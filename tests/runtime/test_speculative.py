"""Speculative sampling changes nothing about what is sampled."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.generation.sampler import choose
from runtime.generation.speculative import verify


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
