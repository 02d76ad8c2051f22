"""The nouns every layer uses: prompts, demonstrations, samples, verdicts, and what a domain offers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

Message = dict[str, Any]
"""One turn in the chat format: `role`, `content`, and where it applies `reasoning_content`, `tool_calls`, `tools`."""

STATUSES = ("ok", "wrong", "timeout", "memory", "crash", "unparsable", "infrastructure")
"""What became of a verification; only `infrastructure` says nothing about the model."""


@dataclass(frozen=True)
class Prompt:
    """A task: what the model is shown, and what only the verifier knows.

    Attributes:
        id: unique and stable, `<domain>/<split>/<number>`.
        domain: name of the domain that made it and will grade it.
        messages: system and user turns that the model is shown.
        truth: what the verifier needs (gold answer, hidden tests, expected database); never shown to the model.
    """

    id: str
    domain: str
    messages: list[Message]
    truth: dict[str, Any]


@dataclass(frozen=True)
class Demonstration:
    """A prompt with the turns of somebody who answered it: assistant turns, and tool turns between them."""

    prompt: Prompt
    messages: list[Message]


@dataclass
class Sample:
    """One finished rollout, token by token.

    Attributes:
        prompt: the task it answers.
        tokens: [T] the whole conversation: prompt, sampled turns, tool results.
        sampled: [T] True where the policy chose the token; only these are trained on.
        logprobs: [T] nats, of the chosen token under the distribution it was sampled from; 0 where not sampled.
        messages: the parsed assistant turns with the tool turns between them; a turn that did not parse has `error`.
        outcome: what the domain's environment left behind (the agent's database), empty without one.
        truncated: the token budget ended it.
        policy_version: optimizer steps that the sampling weights had seen.
        drafted, accepted: tokens that speculative decoding proposed, and how many of them stayed.
    """

    prompt: Prompt
    tokens: list[int]
    sampled: list[bool]
    logprobs: list[float]
    messages: list[Message] = field(default_factory=list)
    outcome: dict[str, Any] = field(default_factory=dict)
    truncated: bool = False
    policy_version: int = 0
    drafted: int = 0
    accepted: int = 0


@dataclass(frozen=True)
class Verdict:
    """What a verifier says of one sample.

    Attributes:
        reward: 0 to 1; meaningless when `status` is `infrastructure`, such a sample is masked and counted.
        status: one of `STATUSES`.
        ms: milliseconds the verification took.
        detail: one line for a person: what differed.
    """

    reward: float
    status: str
    ms: float = 0.0
    detail: str = ""


class TaskSource(Protocol):
    """Where a domain's text comes from: made up on the spot, or read from files."""

    def documents(self, count: int, *, seed: int) -> list[str]:
        """See `Domain.documents`."""

    def boilerplate(self) -> list[str]:
        """Constant strings of its prompts (tool schemas), which a tokenizer trained here may keep whole."""

    def prompts(self, split: str, count: int, *, seed: int) -> list[Prompt]:
        """See `Domain.prompts`."""

    def demonstrations(self, count: int, *, seed: int) -> list[Demonstration]:
        """See `Domain.demonstrations`."""


class Environment(Protocol):
    """Answers the model's turns for a batch of episodes of a multi-turn domain."""

    def open(self, prompts: Sequence[Prompt]) -> list[int]:
        """Start one episode a prompt; returns their handles."""

    def respond(self, turns: Sequence[tuple[int, Message]]) -> list[list[Message]]:
        """Answer each (handle, assistant turn) with tool turns; an empty list ends that episode."""

    def finish(self, handles: Sequence[int]) -> list[dict[str, Any]]:
        """End episodes and return what each left behind."""

    def close(self) -> None:
        """Release processes; idempotent."""


class Domain(Protocol):
    """What a domain offers: tasks, demonstrations, an environment where it has one, and verdicts."""

    name: str
    thinking_mode: str
    """`thinking` or `chat`: how the model is asked to answer."""

    def documents(self, count: int, *, seed: int) -> list[str]:
        """Raw text of the domain for pre-training: no chat, no task of either split."""

    def boilerplate(self) -> list[str]:
        """Constant strings of its prompts (tool schemas), which a tokenizer trained here may keep whole."""

    def prompts(self, split: str, count: int, *, seed: int) -> list[Prompt]:
        """The first `count` prompts of split `train` or `heldout`; a longer call extends a shorter one."""

    def demonstrations(self, count: int, *, seed: int) -> list[Demonstration]:
        """Demonstrations on training prompts."""

    def environment(self) -> Environment | None:
        """A fresh environment for one generator, None where an answer is a single turn."""

    def grade(self, samples: Sequence[Sample]) -> list[Verdict]:
        """One verdict a sample, in order."""

    def close(self) -> None:
        """Release the verifier's processes; idempotent."""
