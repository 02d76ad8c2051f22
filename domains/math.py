"""The math domain: word problems answered after thinking, graded by math-verify on the one boxed answer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from time import perf_counter

from domains.sandbox.grader import GraderFailure, GraderProcess
from domains.types import Demonstration, Environment, Prompt, Sample, TaskSource, Verdict

_MAX_CONTENT = 20_000
"""Characters of a final answer that are searched for a box at all."""
_MAX_ANSWER = 64
"""Characters inside the box."""
_BOX = re.compile(r"\\boxed\s*\{")
_INTEGER = re.compile(r"-?\d+")
_UNFINISHED = re.compile(r"[+*^!/]|[\w)}\]]\s*-|\\(?:cdot|times|frac|dfrac|div|sqrt|sum)")
_REMEMBERED = 200_000
"""Comparisons kept; the same pair always gets the same verdict."""


class MathDomain:
    """Word problems with a number for an answer.

    Math-verify is right about mathematics and lenient about everything else, so the guards are ours: exactly one box, a short one, no
    equation unless the true answer is one, and no arithmetic left undone where the true answer is an integer.
    """

    thinking_mode = "thinking"

    def __init__(self, name: str, source: TaskSource) -> None:
        """Grade the tasks of `source`; the grader's process starts with the first sample."""
        self.name = name
        self._source = source
        self._grader = GraderProcess("domains.math_grader:grade", timeout_s=10.0, memory_mib=1024)
        self._known: dict[tuple[str, str], bool] = {}

    def documents(self, count: int, *, seed: int) -> list[str]:
        """Return raw text for pre-training."""
        return self._source.documents(count, seed=seed)

    def boilerplate(self) -> list[str]:
        """Return the constant strings of the source's prompts."""
        return self._source.boilerplate()

    def prompts(self, split: str, count: int, *, seed: int) -> list[Prompt]:
        """Return the first `count` prompts of a split; `truth` holds `answer`."""
        return self._source.prompts(split, count, seed=seed)

    def demonstrations(self, count: int, *, seed: int) -> list[Demonstration]:
        """Return answered training prompts."""
        return self._source.demonstrations(count, seed=seed)

    def environment(self) -> Environment | None:
        """Return None: an answer is a single turn."""
        return None

    def grade(self, samples: Sequence[Sample]) -> list[Verdict]:
        """Return 1 for a boxed answer equal to the true one; comparisons are remembered, so a repeated answer costs nothing."""
        start = perf_counter()
        answers = [_answer(sample) for sample in samples]
        pairs = {
            (sample.prompt.truth["answer"], answer)
            for sample, answer in zip(samples, answers)
            if answer is not None and _refusal(sample.prompt.truth["answer"], answer) is None
        }
        failures = self._compare(sorted(pairs - self._known.keys()))
        ms = (perf_counter() - start) * 1000 / max(len(samples), 1)
        return [self._verdict(sample, answer, failures, ms=ms) for sample, answer in zip(samples, answers)]

    def close(self) -> None:
        """End the grader's process."""
        self._grader.close()

    def _compare(self, pairs: list[tuple[str, str]]) -> dict[tuple[str, str], GraderFailure]:
        if not pairs:
            return {}
        if len(self._known) > _REMEMBERED:
            self._known.clear()
        failures = {}
        for pair, result in zip(pairs, self._grader.call_many([{"gold": gold, "answer": answer} for gold, answer in pairs])):
            if isinstance(result, GraderFailure):
                failures[pair] = result
            else:
                self._known[pair] = bool(result["correct"])
        return failures

    def _verdict(self, sample: Sample, answer: str | None, failures: dict[tuple[str, str], GraderFailure], *, ms: float) -> Verdict:
        gold = sample.prompt.truth["answer"]
        if answer is None:
            return Verdict(0.0, "unparsable", ms, "no finished turn with exactly one closed \\boxed{...}")
        if refusal := _refusal(gold, answer):
            return Verdict(0.0, "wrong", ms, refusal)
        if failure := failures.get((gold, answer)):
            return Verdict(0.0, failure.status, ms, failure.detail)
        if self._known[gold, answer]:
            return Verdict(1.0, "ok", ms)
        return Verdict(0.0, "wrong", ms, f"got {answer!r}, expected {gold!r}")


def _answer(sample: Sample) -> str | None:
    """Return what the one box of the final turn holds, None where there is no such thing."""
    if sample.truncated or len(sample.messages) != 1 or "error" in sample.messages[0]:
        return None
    content = sample.messages[0].get("content")
    if not isinstance(content, str) or len(content) > _MAX_CONTENT or sample.messages[0].get("tool_calls"):
        return None
    boxes = list(_BOX.finditer(content))
    return _braced(content, boxes[0].end()) if len(boxes) == 1 else None


def _braced(text: str, start: int) -> str | None:
    """Return the text from `start` to the brace that closes the one before it."""
    depth = 1
    for index in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[index], 0)
        if depth == 0:
            return text[start:index].strip()
    return None


def _refusal(gold: str, answer: str) -> str | None:
    """Say why an answer is wrong whatever math-verify thinks of it."""
    if not answer:
        return "the box is empty"
    if len(answer) > _MAX_ANSWER:
        return f"the box holds {len(answer)} characters, at most {_MAX_ANSWER} are read"
    if "=" in answer and "=" not in gold:
        return "an equation where a value is asked for"
    if _INTEGER.fullmatch(gold) and _UNFINISHED.search(answer):
        return "arithmetic left undone"
    return None
