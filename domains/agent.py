"""The agent domain: errands in a shop through tool calls, graded on the database that is left and on the final answer."""

from __future__ import annotations

import itertools
import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from domains.config import SandboxConfig
from domains.sandbox.sandbox import Sandbox, Session, SessionLost
from domains.types import Demonstration, Message, Prompt, Sample, TaskSource, Verdict

logger = logging.getLogger(__name__)

_SERVER = Path(__file__).with_name("agent_server.py").read_text(encoding="utf-8")
_MAX_CALLS = 4
"""Calls in one turn; no errand needs more than two."""
_MAX_ARGUMENTS = 2000
"""Characters of one call's arguments."""
_MAX_ANSWER = 2000
_NUMBER = re.compile(r"\d+")


class AgentDomain:
    """Errands with tools; 1 only when the database is exactly as it should be and the answer tells exactly the right numbers."""

    thinking_mode = "thinking"

    def __init__(self, name: str, source: TaskSource, config: SandboxConfig) -> None:
        """Grade the errands of `source`, whose shops live in a sandbox.

        Raises:
            SandboxUnavailable: this machine has no safe way to run the shops.
        """
        self.name = name
        self._source = source
        self._sandbox = Sandbox(config)

    def documents(self, count: int, *, seed: int) -> list[str]:
        """Return raw text for pre-training."""
        return self._source.documents(count, seed=seed)

    def boilerplate(self) -> list[str]:
        """Return the constant strings of the source's prompts."""
        return self._source.boilerplate()

    def prompts(self, split: str, count: int, *, seed: int) -> list[Prompt]:
        """Return the first `count` prompts of a split; `truth` holds `database`, `expected` (its tables afterwards) and `facts`."""
        return self._source.prompts(split, count, seed=seed)

    def demonstrations(self, count: int, *, seed: int) -> list[Demonstration]:
        """Return conversations on training prompts."""
        return self._source.demonstrations(count, seed=seed)

    def environment(self) -> AgentEnvironment:
        """Return a fresh environment with a process of its own, started with its first episode."""
        return AgentEnvironment(self._sandbox)

    def grade(self, samples: Sequence[Sample]) -> list[Verdict]:
        """Compare each sample's database and final answer with what its prompt expects."""
        return [_judge(sample) for sample in samples]

    def close(self) -> None:
        """Do nothing: environments close themselves."""


class AgentEnvironment:
    """The shops of many episodes in one sandboxed process.

    Only databases and tool calls go in; what an errand expects stays outside. A lost process ends its episodes as `lost`, which is nobody's
    fault, and the next episodes get a new one.
    """

    def __init__(self, sandbox: Sandbox) -> None:
        """Start nothing yet."""
        self._sandbox = sandbox
        self._session: Session | None = None
        self._handles = itertools.count()
        self._lost: dict[int, str] = {}
        self._open: set[int] = set()

    def open(self, prompts: Sequence[Prompt]) -> list[int]:
        """Build one database a prompt; returns the episodes' handles."""
        handles = [next(self._handles) for _ in prompts]
        self._open.update(handles)
        self._ask({"open": [[handle, prompt.truth["database"]] for handle, prompt in zip(handles, prompts)]})
        return handles

    def respond(self, turns: Sequence[tuple[int, Message]]) -> list[list[Message]]:
        """Execute the calls of each turn; a turn without calls, or that did not parse, ends its episode.

        Returns:
            Tool turns in the order of the calls, errors among them in words.
        """
        asked = [(handle, _calls(turn)) for handle, turn in turns]
        answer = self._ask({"calls": [[handle, calls] for handle, calls in asked if calls and handle not in self._lost]})
        results = iter(answer["results"])
        replies: list[list[Message]] = []
        for (_, turn), (handle, calls) in zip(turns, asked):
            if calls and handle not in self._lost:
                replies.append([_reply(call, text) for call, text in zip(turn["tool_calls"], next(results))])
            else:
                replies.append(
                    [] if calls is not None else [{"role": "tool", "content": f"error: at most {_MAX_CALLS} short calls at once"}]
                )
        return replies

    def finish(self, handles: Sequence[int]) -> list[dict[str, Any]]:
        """End episodes; returns `database`, or `lost` and why."""
        alive = [handle for handle in handles if handle not in self._lost]
        databases = dict(zip(alive, self._ask({"finish": alive})["databases"]))
        self._open.difference_update(handles)
        return [{"lost": self._lost.pop(handle)} if handle in self._lost else {"database": databases[handle]} for handle in handles]

    def close(self) -> None:
        """End the process; idempotent."""
        if self._session is not None:
            self._session.close()
            self._session = None

    def _ask(self, request: dict[str, list[Any]]) -> dict[str, Any]:
        """Send a request; where the process is lost, so are all open episodes, and the answer is empty."""
        size = sum(map(len, request.values()))
        try:
            if not size:
                return {"results": [], "databases": []}
            if self._session is None:
                self._session = self._sandbox.session(_SERVER)
            return self._session.call(request, timeout_s=10.0 + 0.05 * size)
        except SessionLost as error:
            logger.warning("the shops of %d episodes are lost: %s", len(self._open), error)
            self.close()
            self._lost.update(dict.fromkeys(self._open, str(error)))
            return {"results": [], "databases": []}


def _calls(turn: Message) -> list[list[Any]] | None:
    """Return (name, arguments) of each call, nothing where the turn has none, None where it has too much of them."""
    if "error" in turn:
        return []
    calls = [call["function"] for call in turn.get("tool_calls") or []]
    if len(calls) > _MAX_CALLS or any(len(call["name"]) + len(call["arguments"]) > _MAX_ARGUMENTS for call in calls):
        return None
    return [[call["name"], json.loads(call["arguments"])] for call in calls]


def _reply(call: dict[str, Any], text: str) -> Message:
    reply = {"role": "tool", "content": text}
    return reply | {"tool_call_id": call["id"]} if "id" in call else reply


def _judge(sample: Sample) -> Verdict:
    if "lost" in sample.outcome:
        return Verdict(0.0, "infrastructure", detail=sample.outcome["lost"])
    last = sample.messages[-1] if sample.messages else {"error": "nothing was said"}
    if sample.truncated or last.get("role") != "assistant" or "error" in last or last.get("tool_calls"):
        return Verdict(0.0, "unparsable", detail="no finished final answer")
    truth = sample.prompt.truth
    content = last.get("content")
    if not isinstance(content, str) or len(content) > _MAX_ANSWER:
        return Verdict(0.0, "unparsable", detail="no final answer of readable length")
    if sample.outcome.get("database") != truth["expected"]:
        return Verdict(0.0, "wrong", detail="the database is not as it should be")
    told = {number.lstrip("0") or "0" for number in _NUMBER.findall(content)}
    if told != {str(fact) for fact in truth["facts"]}:
        return Verdict(0.0, "wrong", detail=f"told {sorted(told)[:6]}, expected {truth['facts']}")
    return Verdict(1.0, "ok")
