"""The code domain: write a Python function, graded by hidden tests that run in the sandbox and are compared outside it."""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Sequence
from typing import Any

from domains.config import SandboxConfig
from domains.sandbox.cases import CaseResults, run_many, strictly_equal
from domains.sandbox.sandbox import Sandbox
from domains.types import Demonstration, Environment, Prompt, Sample, TaskSource, Verdict

_MAX_CONTENT = 20_000
"""Characters of an answer that are read at all."""
_BLOCK = re.compile(r"^```python\n(.*?)^```[ \t]*$", re.DOTALL | re.MULTILINE)
_REMEMBERED = 100_000
_REPEATABLE = ("ok", "wrong", "crash", "memory")
"""Verdicts worth remembering: a time-out may be the machine's, an infrastructure failure always is."""
_UNREAD = Verdict(0.0, "unparsable", detail="no finished turn with exactly one block of Python that parses and defines the function")


class CodeDomain:
    """Programs to a specification; 1 for a program that passes every hidden test, else 0."""

    thinking_mode = "thinking"

    def __init__(self, name: str, source: TaskSource, config: SandboxConfig) -> None:
        """Grade the tasks of `source` in a sandbox.

        Raises:
            SandboxUnavailable: this machine has no safe way to run a model's program.
        """
        self.name = name
        self._source = source
        self._sandbox = Sandbox(config)
        self._slots = config.slots
        self._known: dict[tuple[str, str], Verdict] = {}

    def documents(self, count: int, *, seed: int) -> list[str]:
        """Return raw text for pre-training."""
        return self._source.documents(count, seed=seed)

    def boilerplate(self) -> list[str]:
        """Return the constant strings of the source's prompts."""
        return self._source.boilerplate()

    def prompts(self, split: str, count: int, *, seed: int) -> list[Prompt]:
        """Return the first `count` prompts of a split; `truth` holds `function` and `cases`, each with `input` and `expected`."""
        return self._source.prompts(split, count, seed=seed)

    def demonstrations(self, count: int, *, seed: int) -> list[Demonstration]:
        """Return answered training prompts."""
        return self._source.demonstrations(count, seed=seed)

    def environment(self) -> Environment | None:
        """Return None: an answer is a single turn."""
        return None

    def grade(self, samples: Sequence[Sample]) -> list[Verdict]:
        """Run each different (program, tests) pair once and compare its outputs with the expected ones here."""
        programs = [_program(sample) for sample in samples]
        keys = [(program or "", json.dumps(sample.prompt.truth, sort_keys=True)) for program, sample in zip(programs, samples)]
        todo = {key: sample.prompt.truth for key, sample in zip(keys, samples) if key[0] and key not in self._known}
        new = self._run(todo)
        verdicts = [_UNREAD if not key[0] else new.get(key) or self._known[key] for key in keys]
        if len(self._known) > _REMEMBERED:
            self._known.clear()
        self._known.update({key: verdict for key, verdict in new.items() if verdict.status in _REPEATABLE})
        return verdicts

    def close(self) -> None:
        """Do nothing: every sandbox ended with its program."""

    def _run(self, todo: dict[tuple[str, str], dict[str, Any]]) -> dict[tuple[str, str], Verdict]:
        jobs = [(program, truth["function"], [case["input"] for case in truth["cases"]]) for (program, _), truth in todo.items()]
        results = run_many(self._sandbox, jobs, slots=self._slots)
        return {key: _judge(result, truth["cases"]) for (key, truth), result in zip(todo.items(), results)}


def _judge(results: CaseResults, cases: list[dict[str, Any]]) -> Verdict:
    if results.status == "infrastructure":
        return Verdict(0.0, "infrastructure", results.ms, results.detail)
    for number, (output, case) in enumerate(zip(results.outputs, cases)):
        if not output.ok and results.status != "ok":
            return Verdict(0.0, results.status, results.ms, results.detail)
        if not output.ok:
            return Verdict(0.0, "wrong", results.ms, f"case {number}: {output.error[:100]}")
        if not strictly_equal(output.value, case["expected"]):
            got = repr(output.value)[:60]
            return Verdict(0.0, "wrong", results.ms, f"case {number}: got {got}, expected {case['expected']!r}")
    if results.status != "ok" or len(results.outputs) != len(cases):
        return Verdict(0.0, results.status if results.status != "ok" else "crash", results.ms, results.detail)
    return Verdict(1.0, "ok", results.ms)


def _program(sample: Sample) -> str | None:
    """Return the one Python block of the final turn where it parses and defines the function, else None."""
    if sample.truncated or len(sample.messages) != 1 or "error" in sample.messages[0] or sample.messages[0].get("tool_calls"):
        return None
    content = sample.messages[0].get("content")
    if not isinstance(content, str) or len(content) > _MAX_CONTENT:
        return None
    blocks = _BLOCK.findall(content)
    if len(blocks) != 1 or content.count("```") != 2:
        return None
    return blocks[0] if _defines(blocks[0], sample.prompt.truth["function"]) else None


def _defines(program: str, function: str) -> bool:
    """Say whether `program` parses and has `function` at its top level; nothing of it is run."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(program)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return any(isinstance(node, ast.FunctionDef) and node.name == function for node in tree.body)
