"""Call a candidate function on many inputs in one sandbox; comparing with the expected answers is left to the caller."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from domains.sandbox.sandbox import Completed, Sandbox

Job = tuple[str, str, list[list[Any]]]
"""A candidate: source text, name of the function, one list of arguments for each call."""
_RUNNER = Path(__file__).with_name("inside_cases.py").read_text()


@dataclass(frozen=True)
class CaseOutput:
    """What one call gave.

    Attributes:
        ok: it returned a value made of None, bool, int, finite float, str, list, tuple and dict with str keys.
        value: that value as JSON holds it (tuples became lists); None where not ok. Compare with `strictly_equal`.
        error: why not ok, one line.
    """

    ok: bool
    value: Any
    error: str


@dataclass(frozen=True)
class CaseResults:
    """What a candidate gave for all its inputs.

    Attributes:
        status: `ok` (every call was made, whatever it gave), `timeout`, `memory`, `crash` or `infrastructure`.
        outputs: one an input, in order; calls that were not reached are not ok.
        ms: milliseconds, start-up of the sandbox included.
        detail: one line for a person.
    """

    status: str
    outputs: list[CaseOutput]
    ms: float
    detail: str


def run_cases(sandbox: Sandbox, source: str, function: str, inputs: list[list[Any]]) -> CaseResults:
    """Define `source` in one fresh sandbox and call `function(*arguments)` for each input.

    Args:
        sandbox: where; its configuration bounds time and memory of all calls together.
        source: the candidate's Python text.
        function: the name it must define.
        inputs: [case] lists of JSON arguments.

    Returns:
        Outputs, never a verdict: a candidate that forges them has answered, rightly or wrongly, and nothing more.
    """
    stdin = json.dumps({"source": source, "function": function, "inputs": inputs}).encode()
    completed = sandbox.run(_RUNNER, stdin)
    outputs, end = _parse(completed.result, len(inputs))
    status, detail = _judge(completed, end, complete=len(outputs) == len(inputs))
    missing = CaseOutput(False, None, detail or "not reached")
    return CaseResults(status, outputs + [missing] * (len(inputs) - len(outputs)), completed.ms, detail)


def run_many(sandbox: Sandbox, jobs: Sequence[Job], *, slots: int) -> list[CaseResults]:
    """Run several candidates, `slots` at a time, each in its own sandbox; the order is kept."""
    if slots < 1:
        raise ValueError(f"slots: got {slots}, expected at least 1")
    if slots == 1 or len(jobs) < 2:
        return [run_cases(sandbox, *job) for job in jobs]
    with ThreadPoolExecutor(max_workers=slots, thread_name_prefix="sandbox-slot") as pool:
        return list(pool.map(lambda job: run_cases(sandbox, *job), jobs))


def strictly_equal(left: Any, right: Any) -> bool:
    """Compare plain JSON values by type and value: True is not 1, and 1 is not 1.0."""
    if type(left) is not type(right):
        return False
    if type(left) is list:
        return len(left) == len(right) and all(strictly_equal(a, b) for a, b in zip(left, right, strict=True))
    if type(left) is dict:
        return left.keys() == right.keys() and all(strictly_equal(left[key], right[key]) for key in left)
    return bool(left == right)


def _parse(result: bytes, count: int) -> tuple[list[CaseOutput], str | None]:
    """Read the runner's lines up to the first damaged one.

    Returns:
        At most `count` outputs, and the text of the closing line: "" for a clean end, None where there is no such line
        or anything follows it.
    """
    outputs: list[CaseOutput] = []
    lines = result.split(b"\n")
    for number, line in enumerate(lines):
        try:
            record = json.loads(line, parse_constant=_refuse_constant)
        except (ValueError, RecursionError):
            return outputs, None
        match record:
            case ["case", True, value] if len(outputs) < count:
                outputs.append(CaseOutput(True, value, ""))
            case ["case", False, str(error)] if len(outputs) < count:
                outputs.append(CaseOutput(False, None, error))
            case ["end", str(why)]:
                return outputs, why if lines[number + 1 :] == [b""] else None
            case _:
                return outputs, None
    return outputs, None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"not a finite number: {name}")


def _judge(completed: Completed, end: str | None, *, complete: bool) -> tuple[str, str]:
    if completed.status != "ok":
        return completed.status, completed.detail
    if end:
        return "crash", end
    if end is None or not complete:
        return "crash", "the process ended before all calls were made"
    return "ok", ""
