"""The generator: batched decoding with a rolling cache, turns with an environment between them, rows leaving when done.

Every row is either being told something (`given` is not empty: tool results are fed token by token beside the sampling of
the other rows) or sampling. A row that ends its turn is parsed and shown to its environment; what comes back is given to it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from domains.catalog import make_domain
from domains.config import SandboxConfig
from domains.types import Domain, Environment, Prompt, Sample
from model import drafting
from model.cache import Cache
from model.decoding import Decoder, decoder_for, is_compiled
from model.graph_decoding import GraphDecoder, hindrance
from model.tokenizer import Tokenizer
from model.transfer import send
from model.transformer import Transformer
from runtime.config import SamplingConfig
from runtime.generation.conversation import prompt_tokens
from runtime.generation.lookahead import decode_ahead
from runtime.generation.rows import Row, Turns, advance
from runtime.generation.sampler import choose, uniforms
from runtime.generation.speculative import DRAWS, decode_speculatively
from runtime.step import DomainSetup

logger = logging.getLogger(__name__)
TURN_ALLOWANCE = 96
"""Cache positions kept for what an environment says between two turns; more truncates the sample."""


class Generator:
    """Answers prompts with a model that somebody else may be training: it reads the weights in place."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer, setups: dict[str, DomainSetup], sandbox: SandboxConfig) -> None:
        self.model, self.tokenizer, self.setups, self.sandbox = model, tokenizer, setups, sandbox
        self._domains: dict[str, Domain] = {}
        self._environments: dict[str, Environment | None] = {}
        self._graphs = GraphDecoder(model)
        self._said = ""

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
        at_once = max(1, sampling.rows // samples)
        hindered = hindrance(self.model)
        decoding = decoder_for(self.model) if hindered and not sampling.speculative else None
        self._say(_how(self.model, sampling, hindered))
        out: list[Sample] = []
        for start in range(0, len(prompts), at_once):
            tasks = list(zip(prompts[start : start + at_once], seeds[start : start + at_once], strict=True))
            out += self._generate(tasks, sampling, samples, decoding=decoding)
        return out

    def close(self) -> None:
        """End environments and domains."""
        for closable in [*self._environments.values(), *self._domains.values()]:
            if closable is not None:
                closable.close()
        self._domains, self._environments = {}, {}

    def _say(self, how: str) -> None:
        """Log how rows are decoded, when it is news."""
        if how != self._said:
            logger.info("decoding in %s", how)
            self._said = how

    def _generate(
        self, tasks: list[tuple[Prompt, int]], sampling: SamplingConfig, samples: int, *, decoding: Callable[[Cache], Decoder] | None
    ) -> list[Sample]:
        """Answer prompts, each with its seed, together: speculatively, with a decoder, or without one in CUDA graphs."""
        domain, environment = self._domain(tasks[0][0].domain)
        encoded = [prompt_tokens(self.tokenizer, prompt.messages, domain.thinking_mode) for prompt, _ in tasks]
        logits, cache = self._prefill(encoded, sampling)
        source = torch.arange(len(tasks) * samples, device=logits.device) // samples
        logits = logits[source]
        if decoding is None and not sampling.speculative:
            self._graphs.start(cache, source, temperature=sampling.temperature)
        rows = _rows(tasks, encoded, sampling, samples)  # while a GPU is at what it was told above
        if environment is not None:
            for row, episode in zip(rows, environment.open([r.prompt for r in rows]), strict=True):
                row.episode = episode
        turns = Turns(self.tokenizer, domain, environment, sampling, cache.capacity)
        if sampling.speculative:
            decode_speculatively(rows, logits, self.model, cache.select(source), turns)
        elif decoding is None:
            del cache  # copied; with one sample a prompt it is as large as what the graphs work on
            self._graphs.enter(*_choose(rows, logits, sampling))
            decode_ahead(rows, self._graphs, turns)
        else:
            self._decode(rows, logits, decoding(cache.select(source)), turns)
        outcomes = [{} for _ in rows] if environment is None else environment.finish([r.episode for r in rows])
        return [row.sample(outcome) for row, outcome in zip(rows, outcomes, strict=True)]

    def _prefill(self, encoded: list[list[int]], sampling: SamplingConfig) -> tuple[Tensor, Cache]:
        """Run each prompt once; returns the logits [P, V] of what follows, and a cache with a row a prompt."""
        device, dtype = self.model.embed.weight.device, self.model.embed.weight.dtype
        capacity = max(map(len, encoded)) + sampling.max_new_tokens + TURN_ALLOWANCE * (sampling.max_turns - 1) + 1
        cache = Cache(self.model.config, rows=len(encoded), capacity=capacity, device=device, dtype=dtype)
        lengths = torch.tensor([0, *map(len, encoded)])
        tokens = send(torch.tensor([t for prompt in encoded for t in prompt]), device)
        cu_seqlens = lengths.cumsum(0)
        prefilled = (
            drafting.prefill(self.model, tokens, cu_seqlens, cache)
            if sampling.speculative
            else self.model.prefill(tokens, cu_seqlens, cache)
        )
        return self.model.head(prefilled), cache

    def _decode(self, rows: list[Row], logits: Tensor, decoder: Decoder, turns: Turns) -> None:
        while True:
            if self._advance(rows, logits, turns):
                alive = [i for i, row in enumerate(rows) if not row.done]
                if not alive:
                    return
                rows = [rows[i] for i in alive]
                decoder.keep(alive)
            logits = decoder.step([r.tokens[-1] for r in rows])

    def _advance(self, rows: list[Row], logits: Tensor, turns: Turns) -> bool:
        """Give every row its next token and end the turns that are over; returns whether there were any."""
        chosen, logprobs = _choose(rows, logits, turns.sampling)
        budget = turns.sampling.max_new_tokens
        ended = [
            row
            for row, token, logprob in zip(rows, chosen.tolist(), logprobs.tolist(), strict=True)
            if advance(row, token, logprob, eos=self.tokenizer.eos, budget=budget, limit=turns.limit)
        ]
        if ended:
            turns.end(ended)
        return bool(ended)

    def _domain(self, name: str) -> tuple[Domain, Environment | None]:
        if name not in self._domains:
            self._domains[name] = make_domain(name, self.setups[name].domain, self.sandbox)
            self._environments[name] = self._domains[name].environment()
        return self._domains[name], self._environments[name]


def _rows(tasks: list[tuple[Prompt, int]], encoded: list[list[int]], sampling: SamplingConfig, samples: int) -> list[Row]:
    """Begin the samples of prompts, each with its seed; those of one prompt stand together."""
    count = sampling.max_new_tokens * (DRAWS if sampling.speculative else 1)
    return [
        Row(prompt, list(tokens), uniforms(seed, g, count) if sampling.temperature > 0 else None)
        for (prompt, seed), tokens in zip(tasks, encoded, strict=True)
        for g in range(samples)
    ]


def _choose(rows: list[Row], logits: Tensor, sampling: SamplingConfig) -> tuple[Tensor, Tensor]:
    """Choose the next token of each row from logits [B, V]: tokens [B] and their log-probs [B], nats."""
    if sampling.temperature == 0:
        return choose(logits, None, 0.0)
    numbers = [row.draws[min(row.count, sampling.max_new_tokens - 1)] for row in rows if row.draws is not None]
    return choose(logits, send(torch.from_numpy(np.array(numbers)), logits.device), sampling.temperature)


def _how(model: Transformer, sampling: SamplingConfig, hindered: str) -> str:
    """Name what decodes, and what hinders the faster ways."""
    if sampling.speculative:
        return "torch, two tokens a pass"
    if not hindered:
        return "a CUDA graph"
    return "compiled loops" if is_compiled(model) else f"torch: {hindered}"
