"""Samples in the making: what happens to a row when it gets a token and when its turn ends."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from domains.types import Domain, Environment, Message, Prompt, Sample
from model.tokenizer import Tokenizer
from runtime.config import SamplingConfig
from runtime.generation.conversation import continuation_tokens, parse_turn


@dataclass
class Row:
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
    drafted: int = 0
    accepted: int = 0

    def sample(self, outcome: dict) -> Sample:
        """Return the finished sample."""
        flags, values = [False] * len(self.tokens), [0.0] * len(self.tokens)
        for position, logprob in zip(self.sampled, self.logprobs, strict=True):
            flags[position], values[position] = True, logprob
        made = Sample(self.prompt, self.tokens, flags, values, self.messages, outcome, self.truncated)
        made.drafted, made.accepted = self.drafted, self.accepted
        return made


def advance(row: Row, token: int, logprob: float, *, eos: int, budget: int, limit: int) -> bool:
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


def _truncate(row: Row) -> bool:
    row.truncated = True
    return True


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
