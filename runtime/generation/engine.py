"""The generator: batched decoding with a rolling cache, turns with an environment between them, rows leaving when done.

Every row is either being told something (`given` is not empty: tool results are fed token by token beside the sampling of
the other rows) or sampling. A row that ends its turn is parsed and shown to its environment; what comes back is given to it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from domains.catalog import make_domain
from domains.config import SandboxConfig
from domains.types import Domain, Environment, Message, Prompt, Sample
from model.cache import Cache
from model.decoding import Decoder, decoder_for
from model.tokenizer import Tokenizer
from model.transformer import Transformer
from runtime.config import SamplingConfig
from runtime.generation.conversation import continuation_tokens, parse_turn, prompt_tokens
from runtime.generation.sampler import choose, uniforms
from runtime.step import DomainSetup

MAX_ROWS = 256
"""Rows decoded together."""
TURN_ALLOWANCE = 96
"""Cache positions kept for what an environment says between two turns; more truncates the sample."""


@dataclass
class _Row:
    """One sample in the making."""

    prompt: Prompt
    tokens: list[int]
    prompt_length: int
    draws: list[float] | None
    episode: int = -1
    given: deque[int] = field(default_factory=deque)
    sampled: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    turn_start: int = 0
    turns: int = 0
    done: bool = False
    truncated: bool = False

    def sample(self, outcome: dict) -> Sample:
        """Return the finished sample."""
        flags, values = [False] * len(self.tokens), [0.0] * len(self.tokens)
        for position, logprob in zip(self.sampled, self.logprobs, strict=True):
            flags[position], values[position] = True, logprob
        return Sample(self.prompt, self.tokens, flags, values, self.messages, outcome, self.truncated)


class Generator:
    """Answers prompts with a model that somebody else may be training: it reads the weights in place."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer, setups: dict[str, DomainSetup], sandbox: SandboxConfig) -> None:
        self.model, self.tokenizer, self.setups, self.sandbox = model, tokenizer, setups, sandbox
        self._domains: dict[str, Domain] = {}
        self._environments: dict[str, Environment | None] = {}

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Prompt], seeds: Sequence[int], sampling: SamplingConfig, *, samples: int) -> list[Sample]:
        """Answer prompts of one domain.

        Args:
            prompts: P prompts.
            seeds: [P] random stream of each prompt.
            sampling: temperature and budgets; temperature 0 is greedy.
            samples: G answers a prompt.

        Returns:
            P * G samples, those of one prompt together.
        """
        at_once = max(1, MAX_ROWS // samples)
        decoding = decoder_for(self.model)
        out: list[Sample] = []
        for start in range(0, len(prompts), at_once):
            rows = self._rows(prompts[start : start + at_once], seeds[start : start + at_once], sampling, samples)
            out += self._generate(rows, sampling, samples, decoding=decoding)
        return out

    def close(self) -> None:
        """End environments and domains."""
        for closable in [*self._environments.values(), *self._domains.values()]:
            if closable is not None:
                closable.close()
        self._domains, self._environments = {}, {}

    def _rows(self, prompts: Sequence[Prompt], seeds: Sequence[int], sampling: SamplingConfig, samples: int) -> list[_Row]:
        domain, _ = self._domain(prompts[0].domain)
        encoded = [prompt_tokens(self.tokenizer, p.messages, domain.thinking_mode) for p in prompts]
        return [
            _Row(
                prompt=prompts[i],
                tokens=list(encoded[i]),
                prompt_length=len(encoded[i]),
                draws=uniforms(seeds[i], g, sampling.max_new_tokens).tolist() if sampling.temperature > 0 else None,
                turn_start=len(encoded[i]),
            )
            for i in range(len(prompts))
            for g in range(samples)
        ]

    def _generate(self, rows: list[_Row], sampling: SamplingConfig, samples: int, *, decoding: Callable[[Cache], Decoder]) -> list[Sample]:
        domain, environment = self._domain(rows[0].prompt.domain)
        if environment is not None:
            for row, episode in zip(rows, environment.open([r.prompt for r in rows]), strict=True):
                row.episode = episode
        logits, cache = self._prefill([row.tokens for row in rows[::samples]], sampling, samples)
        self._decode(rows, logits, decoding(cache), _Turns(self.tokenizer, domain, environment, sampling, cache.capacity))
        outcomes = [{} for _ in rows] if environment is None else environment.finish([r.episode for r in rows])
        return [row.sample(outcome) for row, outcome in zip(rows, outcomes, strict=True)]

    def _prefill(self, encoded: list[list[int]], sampling: SamplingConfig, samples: int) -> tuple[Tensor, Cache]:
        """Run each prompt once; its logits and its cache row are then repeated for its samples."""
        device, dtype = self.model.embed.weight.device, self.model.embed.weight.dtype
        capacity = max(map(len, encoded)) + sampling.max_new_tokens + TURN_ALLOWANCE * (sampling.max_turns - 1) + 1
        cache = Cache(self.model.config, rows=len(encoded), capacity=capacity, device=device, dtype=dtype)
        lengths = torch.tensor([0, *map(len, encoded)], device=device)
        tokens = torch.tensor([t for prompt in encoded for t in prompt], device=device)
        logits = self.model.head(self.model.prefill(tokens, lengths.cumsum(0), cache))  # [P, V]
        repeat = torch.arange(len(encoded), device=device).repeat_interleave(samples)
        return logits[repeat], cache.select(repeat)

    def _decode(self, rows: list[_Row], logits: Tensor, decoder: Decoder, turns: _Turns) -> None:
        sampling, limit = turns.sampling, turns.limit
        while True:
            draws = None
            if sampling.temperature > 0:
                draws = torch.tensor(
                    [r.draws[min(len(r.sampled), sampling.max_new_tokens - 1)] for r in rows if r.draws], device=logits.device
                )
            chosen, logprobs = choose(logits, draws, sampling.temperature)
            ended = [
                row
                for row, token, logprob in zip(rows, chosen.tolist(), logprobs.tolist(), strict=True)
                if _advance(row, token, logprob, eos=self.tokenizer.eos, budget=sampling.max_new_tokens, limit=limit)
            ]
            if ended:
                turns.end(ended)
                alive = [i for i, row in enumerate(rows) if not row.done]
                if not alive:
                    return
                rows = [rows[i] for i in alive]
                decoder.keep(alive)
            logits = decoder.step([r.tokens[-1] for r in rows])

    def _domain(self, name: str) -> tuple[Domain, Environment | None]:
        if name not in self._domains:
            self._domains[name] = make_domain(name, self.setups[name].domain, self.sandbox)
            self._environments[name] = self._domains[name].environment()
        return self._domains[name], self._environments[name]


def _advance(row: _Row, token: int, logprob: float, *, eos: int, budget: int, limit: int) -> bool:
    """Append the next token, given or sampled; returns whether the row's turn is over."""
    if row.given:
        row.tokens.append(row.given.popleft())
        return len(row.tokens) >= limit - 1 and _truncate(row)
    row.sampled.append(len(row.tokens))
    row.tokens.append(token)
    row.logprobs.append(logprob)
    if token == eos:
        return True
    return (len(row.sampled) >= budget or len(row.tokens) >= limit - 1) and _truncate(row)


def _truncate(row: _Row) -> bool:
    row.truncated = True
    return True


@dataclass
class _Turns:
    """What happens when a turn ends: parse it, ask the environment, give the row what came back; `limit` tokens fit in a row."""

    tokenizer: Tokenizer
    domain: Domain
    environment: Environment | None
    sampling: SamplingConfig
    limit: int

    def end(self, rows: list[_Row]) -> None:
        """End the turns of several rows at once."""
        asking = []
        for row in rows:
            row.turns += 1
            message = parse_turn(self.tokenizer.decode(row.tokens[row.turn_start :]), self.domain.thinking_mode)
            row.messages.append(message)
            row.done = row.truncated or self.environment is None or len(row.sampled) >= self.sampling.max_new_tokens
            if not row.done:
                asking.append((row, message))
        if self.environment is None or not asking:
            return
        replies = self.environment.respond([(row.episode, message) for row, message in asking])
        for (row, _), reply in zip(asking, replies, strict=True):
            row.done = not reply or row.turns >= self.sampling.max_turns
            if not row.done:
                so_far = [*row.prompt.messages, *row.messages]
                row.given.extend(continuation_tokens(self.tokenizer, so_far, reply, self.domain.thinking_mode))
                row.messages += reply
                row.turn_start = len(row.tokens) + len(row.given)
