"""Samples in the making: what happens to a row when it gets a token and when its turn ends."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from domains.types import Domain, Environment, Message, Prompt, Sample
from model.tokenizer import Tokenizer
from runtime.config import SamplingConfig
from runtime.generation.conversation import continuation_tokens, parse_turn


@dataclass
class Row:
    """One sample in the making.

    Attributes:
        tokens: the prompt's to begin with.
        draws: [n * max_new_tokens] fp32 in [0, 1), they decide the sampled tokens; None is greedy.
        given: tokens that it is still to be told.
        sampled, logprobs: beside `tokens`, as `Sample` has them. count: how many of the tokens are sampled.
        turn_start: tokens before the present turn.
    """

    prompt: Prompt
    tokens: list[int]
    draws: NDArray[np.float32] | None
    episode: int = -1
    given: deque[int] = field(default_factory=deque)
    sampled: list[bool] = field(init=False)
    logprobs: list[float] = field(init=False)
    count: int = 0
    messages: list[Message] = field(default_factory=list)
    turn_start: int = field(init=False)
    turns: int = 0
    done: bool = False
    truncated: bool = False
    drafted: int = 0
    accepted: int = 0

    def __post_init__(self) -> None:
        self.turn_start = len(self.tokens)
        self.sampled, self.logprobs = [False] * len(self.tokens), [0.0] * len(self.tokens)

    def sample(self, outcome: dict) -> Sample:
        """Return the finished sample."""
        made = Sample(self.prompt, self.tokens, self.sampled, self.logprobs, self.messages, outcome, self.truncated)
        made.drafted, made.accepted = self.drafted, self.accepted
        return made


def advance(row: Row, token: int, logprob: float, *, eos: int, budget: int, limit: int) -> bool:
    """Append the next token, given or sampled; returns whether the row's turn is over."""
    samples = not row.given
    row.tokens.append(token if samples else row.given.popleft())
    row.sampled.append(samples)
    row.logprobs.append(logprob if samples else 0.0)
    row.count += samples
    if samples and token == eos:
        return True
    row.truncated = (samples and row.count >= budget) or len(row.tokens) >= limit - 1
    return row.truncated


@dataclass
class Turns:
    """What happens when a turn ends: parse it, ask the environment, give the row what came back; `limit` tokens fit in a row."""

    tokenizer: Tokenizer
    domain: Domain
    environment: Environment | None
    sampling: SamplingConfig
    limit: int

    def end(self, rows: list[Row]) -> None:
        """End the turns of several rows at once."""
        asking = []
        for row in rows:
            row.turns += 1
            message = parse_turn(self.tokenizer.decode(row.tokens[row.turn_start :]), self.domain.thinking_mode)
            row.messages.append(message)
            row.done = row.truncated or self.environment is None or row.count >= self.sampling.max_new_tokens
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
