"""Looking at results a step late changes nothing: samples, log-probs and turns are those of decoding step by step."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from domains.config import SandboxConfig
from domains.types import Prompt
from model.graph_decoding import GraphDecoder, hindrance
from model.transformer import Transformer
from runtime.config import SamplingConfig
from runtime.generation import engine
from runtime.generation.engine import Generator
from runtime.generation.rows import Row
from tiny_models import FEW_WORDS

EOS = 5


class Echo:
    """Turns that are answered with as many tokens as the row has had turns, up to three times."""

    def __init__(self, tokenizer: object, domain: object, environment: object, sampling: SamplingConfig, limit: int) -> None:
        self.tokenizer, self.sampling, self.limit, self.ended = tokenizer, sampling, limit, list[list[str]]()
        LOG.append(self)

    def end(self, rows: list[Row]) -> None:
        self.ended.append([row.prompt.id for row in rows])
        for row in rows:
            row.turns += 1
            row.done = row.truncated or row.turns > self.sampling.max_turns - 1 or row.count >= self.sampling.max_new_tokens
            if not row.done:
                row.given.extend([row.turns] * (1 + 7 * row.turns))


LOG: list[Echo] = []


@pytest.fixture
def generator(monkeypatch: pytest.MonkeyPatch) -> Generator:
    torch.manual_seed(2)
    monkeypatch.setattr(engine, "Turns", Echo)
    tokenizer = SimpleNamespace(eos=EOS, encode=lambda text: [ord(c) % 5 for c in text])
    monkeypatch.setattr(engine, "prompt_tokens", lambda tokenizer, messages, mode: tokenizer.encode(messages[0]["content"]))
    made = Generator(Transformer(FEW_WORDS).eval(), tokenizer, {}, SandboxConfig())  # type: ignore[arg-type]
    made._domains["math"], made._environments["math"] = SimpleNamespace(thinking_mode="chat"), None  # type: ignore[assignment]
    return made


def _samples(generator: Generator, sampling: SamplingConfig, *, ahead: bool, monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    monkeypatch.setattr(engine, "hindrance", lambda model: "" if ahead else "the test")
    prompts = [Prompt(f"p{i}", "math", [{"role": "user", "content": "abcde"[: 1 + i % 5] * (1 + i)}], {}) for i in range(9)]
    out = generator.generate(prompts, list(range(9)), sampling, samples=3)
    return [(s.tokens, s.sampled, s.truncated, s.logprobs) for s in out]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(("tokens", "turns", "rows"), [(40, 1, 64), (60, 4, 64), (1, 2, 64), (25, 3, 9), (200, 4, 64)], ids=str)
def test_samples_are_those_of_decoding_step_by_step(
    generator: Generator, monkeypatch: pytest.MonkeyPatch, temperature: float, tokens: int, turns: int, rows: int
) -> None:
    sampling = SamplingConfig(max_new_tokens=tokens, max_turns=turns, rows=rows, temperature=temperature)
    LOG.clear()
    expected = _samples(generator, sampling, ahead=False, monkeypatch=monkeypatch)
    late = [log.ended for log in LOG]
    LOG.clear()
    got = _samples(generator, sampling, ahead=True, monkeypatch=monkeypatch)
    assert [log.ended for log in LOG] == late
    assert [sample[:3] for sample in got] == [sample[:3] for sample in expected]
    for mine, theirs in zip(got, expected, strict=True):
        assert mine[3] == pytest.approx(theirs[3], abs=1e-4)
    if turns > 1 and tokens > 1:
        assert any(not all(sample[1][len(sample[1]) - sum(sample[1]) :]) for sample in got)  # something was given in between


@pytest.mark.parametrize("allowance", [0, 1, 3, 5])
def test_rows_that_fill_their_place_stop_where_they_would_step_by_step(
    generator: Generator, monkeypatch: pytest.MonkeyPatch, allowance: int
) -> None:
    """Truncated while they are told something, by its last token, or just after it."""
    monkeypatch.setattr(engine, "TURN_ALLOWANCE", allowance)
    sampling = SamplingConfig(max_new_tokens=30, max_turns=4, rows=64, temperature=1.0)
    expected = _samples(generator, sampling, ahead=False, monkeypatch=monkeypatch)
    got = _samples(generator, sampling, ahead=True, monkeypatch=monkeypatch)
    assert [sample[:3] for sample in got] == [sample[:3] for sample in expected]
    ends = [(sample[1][-1], sample[2]) for sample in got]
    assert (False, True) in ends  # full with a token that was given


@pytest.mark.parametrize(("tokens", "least"), [(1, 0), (2, 1), (30, 29)], ids=str)
def test_no_step_is_launched_whose_choices_nobody_takes(
    generator: Generator, monkeypatch: pytest.MonkeyPatch, tokens: int, least: int
) -> None:
    """The last of the rows' tokens is not fed any more."""
    launched = []
    launch = GraphDecoder.launch
    monkeypatch.setattr(GraphDecoder, "launch", lambda self, *args: launched.append(1) or launch(self, *args))
    sampling = SamplingConfig(max_new_tokens=tokens, temperature=1.0)
    made = _samples(generator, sampling, ahead=True, monkeypatch=monkeypatch)
    assert max(sum(sample[1]) for sample in made) == tokens and len(launched) == least


def test_one_generator_serves_calls_of_all_kinds(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits, temperatures and numbers of rows change from call to call, and so do the weights."""
    for tokens, turns, rows, temperature in [(20, 1, 3, 1.0), (20, 1, 64, 0.0), (90, 3, 64, 0.7), (10, 1, 9, 0.0), (40, 2, 64, 1.0)]:
        sampling = SamplingConfig(max_new_tokens=tokens, max_turns=turns, rows=rows, temperature=temperature)
        expected = _samples(generator, sampling, ahead=False, monkeypatch=monkeypatch)
        got = _samples(generator, sampling, ahead=True, monkeypatch=monkeypatch)
        assert [sample[:3] for sample in got] == [sample[:3] for sample in expected]
        with torch.no_grad():
            for parameter in generator.model.parameters():
                parameter.mul_(1.05)


@pytest.mark.parametrize("experts", [False, True], ids=["plain", "experts in FP4"])
def test_log_probs_are_those_of_a_training_pass(generator: Generator, monkeypatch: pytest.MonkeyPatch, experts: bool) -> None:
    generator.model.quantize(experts=experts)
    sampling = SamplingConfig(max_new_tokens=60, max_turns=3, rows=64, temperature=1.0)
    made = _samples(generator, sampling, ahead=True, monkeypatch=monkeypatch)
    tokens, cu_seqlens = (
        torch.tensor([t for sample in made for t in sample[0]]),
        torch.tensor([0, *(len(sample[0]) for sample in made)]).cumsum(0),
    )
    with torch.no_grad():
        logprobs = torch.log_softmax(generator.model.head(generator.model(tokens, cu_seqlens).last), -1)
    where = torch.tensor([flag for sample in made for flag in sample[1]]).nonzero()[:, 0]
    stated = torch.tensor([value for sample in made for value in sample[3]])[where]
    torch.testing.assert_close(logprobs[where - 1, tokens[where]], stated, atol=1e-4, rtol=0)


def test_what_decodes_is_said_once_and_again_when_it_changes(
    generator: Generator, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", engine.__name__)
    sampling = SamplingConfig(max_new_tokens=2, temperature=0.0)
    for kv, ahead in [(False, True), (False, True), (True, False), (False, False)]:
        generator.model.quantize(kv=kv)
        monkeypatch.setattr(engine, "hindrance", (lambda model: "") if ahead else hindrance)
        generator.generate([Prompt("p", "math", [{"role": "user", "content": "abc"}], {})], [0], sampling, samples=1)
    said = [record.getMessage() for record in caplog.records]
    assert said == ["decoding in a CUDA graph", "decoding in torch: index or keys are quantised", "decoding in compiled loops"]
