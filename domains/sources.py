"""Tasks of your own: rows of a JSONL or Parquet file, or of a dataset on the hub, in one schema for all three kinds of domain.

A row is one task, an object with these fields (structured ones may also be JSON text, as Parquet columns need one type):

    prompt     text of the user's turn; or instead
    messages   [{"role": "system" | "user" | "assistant", "content": text}], ending with the user's
    response   text of a good answer; or instead
    turns      [{"role": "assistant" | "tool", "content", "reasoning_content", "tool_calls"}], ending with the assistant's. Rows without
               either serve as tasks, not as demonstrations
    reasoning  text thought before `response`
    split      "train" or "heldout" ("test" and "validation" mean the latter). Without it the prompt's own hash decides
    text       a document for pre-training; a row with it is nothing else

    kind math:  answer    the true answer, as text or an integer
    kind code:  function  name of the function to write
                cases     [{"input": [arguments], "expected": value}], the hidden tests
    kind agent: database  {"customers": [[id, name]], "products": [[id, name, price, stock]],
                           "orders": [[id, customer_id, product_id, quantity]], "next_order_id": id}
                expected  the three tables afterwards, rows ordered by id
                facts     [the numbers that the final answer must tell]
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

from domains.agent_tasks import SYSTEM, TOOLS, schema_block
from domains.procedural import SPLITS, split_of
from domains.types import Demonstration, Message, Prompt

_SPLIT_NAMES = {"train": "train", "heldout": "heldout", "test": "heldout", "validation": "heldout"}
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_COLUMNS = {"customers": (int, str), "products": (int, str, int, int), "orders": (int, int, int, int)}
_LARGEST = 10**9
"""Bound of the numbers in a database, the same that its tools accept."""


class FileSource:
    """The tasks of one file or dataset, all rows checked before the first is used."""

    def __init__(self, name: str, kind: str, location: str) -> None:
        """Read and check every row.

        Args:
            name: the domain that the prompts belong to.
            kind: `math`, `code` or `agent`.
            location: a `.jsonl` or `.parquet` file, or `owner/name` on the hub.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a row misses a field or has a wrong one (naming file, line and field), or a prompt stands in both splits.
        """
        self._kind = kind
        self._location = location
        self._documents: list[str] = []
        self._prompts: dict[str, list[Prompt]] = {split: [] for split in SPLITS}
        self._demonstrations: list[Demonstration] = []
        owner: dict[str, tuple[str, str]] = {}
        for number, (place, hint, values) in enumerate(_rows(location), start=1):
            row = _Row(place, values)
            if row.has("text"):
                self._documents.append(row.text("text"))
                continue
            messages = _messages(row, kind)
            key = json.dumps(messages, sort_keys=True)
            split = _split(row, hint) or split_of(key)
            first_split, first_place = owner.setdefault(key, (split, place))
            if first_split != split:
                raise row.error("split", split, f"{first_split!r}, as for the same prompt at {first_place}")
            prompt = Prompt(f"{name}/{split}/{number}", name, messages, _TRUTHS[kind](row))
            self._prompts[split].append(prompt)
            turns = _turns(row)
            if turns and split == "train":
                self._demonstrations.append(Demonstration(prompt, turns))

    def documents(self, count: int, *, seed: int) -> list[str]:
        """Return up to `count` of the rows that are documents."""
        return _shuffled(self._documents, seed)[:count]

    def boilerplate(self) -> list[str]:
        """Return the tools' schema block for an agent, nothing for the others."""
        return [schema_block()] if self._kind == "agent" else []

    def prompts(self, split: str, count: int, *, seed: int) -> list[Prompt]:
        """Return up to `count` prompts of a split, in an order that the seed decides.

        Raises:
            ValueError: an unknown split, or one without a single row.
        """
        if split not in SPLITS:
            raise ValueError(f"split: got {split!r}, expected one of {SPLITS}")
        if not self._prompts[split]:
            raise ValueError(f"{self._location}: got no row of split {split!r}, expected at least one")
        return _shuffled(self._prompts[split], seed)[:count]

    def demonstrations(self, count: int, *, seed: int) -> list[Demonstration]:
        """Return up to `count` training rows that have an answer.

        Raises:
            ValueError: none has.
        """
        if not self._demonstrations:
            raise ValueError(f"{self._location}: got no training row with `response` or `turns`, expected at least one")
        return _shuffled(self._demonstrations, seed)[:count]


class _Row:
    """One row and where it stands; every complaint names both and the field."""

    def __init__(self, place: str, values: Any) -> None:
        self.place = place
        if not isinstance(values, dict):
            raise ValueError(f"{place}: got {type(values).__name__}, expected an object with fields")
        self._values = values

    def error(self, field: str, got: Any, expected: str) -> ValueError:
        return ValueError(f"{self.place}: {field}: got {repr(got)[:80]}, expected {expected}")

    def has(self, field: str) -> bool:
        return self._values.get(field) is not None

    def text(self, field: str) -> str:
        value = self._values.get(field)
        if not isinstance(value, str) or not value.strip():
            raise self.error(field, value, "a text that is not empty")
        return value

    def plain(self, field: str) -> Any:
        return self._values.get(field)

    def structure(self, field: str) -> Any:
        """Return a structured field, decoded where it is JSON text."""
        value = self._values.get(field)
        if not isinstance(value, str):
            return value
        try:
            return json.loads(value)
        except (ValueError, RecursionError) as error:
            raise self.error(field, value, "JSON") from error


def _rows(location: str) -> Iterator[tuple[str, str | None, Any]]:
    """Yield (place, split that the location itself tells, row)."""
    if location.endswith(".jsonl"):
        with Path(location).open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield f"{location}: line {number}", None, _decoded(location, number, line)
        return
    if not location.endswith(".parquet") and not _HUB_NAME.fullmatch(location):
        raise ValueError(f"source: got {location!r}, expected 'procedural', a .jsonl or .parquet file, or owner/name on the hub")
    import datasets  # heavy: only who reads such a source waits for it

    if location.endswith(".parquet"):
        if not Path(location).exists():
            raise FileNotFoundError(location)
        loaded = {"": datasets.Dataset.from_parquet(location)}
    else:
        loaded = datasets.load_dataset(location)
    for split, rows in loaded.items():
        hint = split if len(loaded) > 1 else None
        for number, row in enumerate(rows, start=1):
            yield f"{location}: {split + ' ' if split else ''}row {number}", hint, row


def _decoded(location: str, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{location}: line {number}: not JSON: {error}") from error


def _split(row: _Row, hint: str | None) -> str | None:
    name = row.plain("split") if row.has("split") else hint
    if name is not None and name not in _SPLIT_NAMES:
        raise row.error("split", name, f"one of {sorted(_SPLIT_NAMES)}")
    return None if name is None else _SPLIT_NAMES[name]


def _messages(row: _Row, kind: str) -> list[Message]:
    if not row.has("messages"):
        messages: list[Message] = [{"role": "user", "content": row.text("prompt")}]
    else:
        messages = [dict(turn) for turn in _conversation(row, "messages", ("system", "user", "assistant"))]
        if messages[-1]["role"] != "user":
            raise row.error("messages", messages[-1]["role"], "the last role to be user")
    if kind == "agent":
        if messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": SYSTEM})
        messages[0]["tools"] = TOOLS
    return messages


def _turns(row: _Row) -> list[Message]:
    if row.has("turns"):
        turns = [dict(turn) for turn in _conversation(row, "turns", ("assistant", "tool"))]
        if turns[-1]["role"] != "assistant":
            raise row.error("turns", turns[-1]["role"], "the last role to be assistant")
        return turns
    if not row.has("response"):
        return []
    reasoning = row.text("reasoning") if row.has("reasoning") else ""
    return [{"role": "assistant", "reasoning_content": reasoning, "content": row.text("response"), "tool_calls": []}]


def _conversation(row: _Row, field: str, roles: tuple[str, ...]) -> list[Message]:
    turns = row.structure(field)
    if not isinstance(turns, list) or not turns:
        raise row.error(field, turns, "a list of messages that is not empty")
    kept = []
    for turn in turns:
        if not isinstance(turn, dict) or turn.get("role") not in roles or not isinstance(turn.get("content", ""), str):
            raise row.error(field, turn, f"messages with `content` and a `role` among {roles}")
        for call in turn.get("tool_calls") or []:
            function = call.get("function") if isinstance(call, dict) else None
            if not isinstance(function, dict) or not isinstance(function.get("name"), str) or "arguments" not in function:
                raise row.error(field, call, 'tool calls as {"function": {"name", "arguments"}}')
        kept.append({key: value for key, value in turn.items() if value is not None})
    return kept


def _math_truth(row: _Row) -> dict[str, Any]:
    answer = row.plain("answer")
    return {"answer": str(answer) if type(answer) is int else row.text("answer").strip()}


def _code_truth(row: _Row) -> dict[str, Any]:
    function = row.text("function")
    if not function.isidentifier():
        raise row.error("function", function, "a Python name")
    cases = row.structure("cases")
    if not isinstance(cases, list) or not cases:
        raise row.error("cases", cases, "a list of tests that is not empty")
    for case in cases:
        if not isinstance(case, dict) or not isinstance(case.get("input"), list) or "expected" not in case:
            raise row.error("cases", case, 'tests as {"input": [arguments], "expected": value}')
    return {"function": function, "cases": [{"input": case["input"], "expected": case["expected"]} for case in cases]}


def _agent_truth(row: _Row) -> dict[str, Any]:
    database, expected, facts = row.structure("database"), row.structure("expected"), row.structure("facts")
    for field, tables in (("database", database), ("expected", expected)):
        if not isinstance(tables, dict) or any(not _is_table(tables.get(name), kinds) for name, kinds in _COLUMNS.items()):
            raise row.error(field, tables, f"tables {', '.join(_COLUMNS)}, rows as documented, no id twice")
    if type(database.get("next_order_id")) is not int:
        raise row.error("database", database.get("next_order_id"), "next_order_id as an integer")
    if not isinstance(facts, list) or not facts or any(type(fact) is not int for fact in facts):
        raise row.error("facts", facts, "a list of integers that is not empty")
    return {"database": database, "expected": {name: expected[name] for name in _COLUMNS}, "facts": facts}


def _is_table(rows: Any, kinds: tuple[type, ...]) -> bool:
    """Say whether the rows have columns of these types and an id each of their own."""
    if not isinstance(rows, list) or any(not isinstance(row, list) or len(row) != len(kinds) for row in rows):
        return False
    typed = all(type(value) is kind and _fits(value) for row in rows for value, kind in zip(row, kinds))
    return typed and len({row[0] for row in rows}) == len(rows)


def _fits(value: Any) -> bool:
    return value.isprintable() if isinstance(value, str) else abs(value) <= _LARGEST


_TRUTHS: dict[str, Callable[[_Row], dict[str, Any]]] = {"math": _math_truth, "code": _code_truth, "agent": _agent_truth}


def _shuffled(items: list[Any], seed: int) -> list[Any]:
    return Random(seed).sample(items, len(items))
