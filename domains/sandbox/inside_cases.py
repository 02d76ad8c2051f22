"""Call a candidate function on every input and report each output. Runs inside the sandbox, standard library only.

Standard input: one JSON object, `source`, `function`, `inputs`. `RESULT_FD` takes JSON lines: `["case", ok, value or
error]` for each input, then `["end", ""]`, or only `["end", why]` where the candidate could not be defined. Whoever
forges these lines only answers questions that are compared elsewhere; the expected answers are not here.
"""

import json
import math
import os
import sys

_ERROR_LENGTH = 200


def _plain(value: object, depth: int = 0) -> object:
    """Copy a value made of exact built-in types into what JSON holds; subclasses may lie and are refused."""
    kind = type(value)
    if value is None or kind is bool or kind is int or kind is str:
        return value
    if kind is float:
        if not math.isfinite(value):  # type: ignore[arg-type]
            raise TypeError("not a finite number")
        return value
    if depth > 100:
        raise TypeError("nested too deeply")
    if kind is list or kind is tuple:
        return [_plain(item, depth + 1) for item in value]  # type: ignore[attr-defined]
    if kind is dict:
        pairs = list(value.items())  # type: ignore[attr-defined]
        if any(type(key) is not str for key, _ in pairs):
            raise TypeError("a dict with keys other than str")
        return {key: _plain(item, depth + 1) for key, item in pairs}
    raise TypeError(f"unsupported type {kind.__name__}")


def _describe(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"[:_ERROR_LENGTH]
    except BaseException:  # noqa: BLE001  (a candidate's exception may refuse to be printed)
        return "an exception that cannot be printed"


def _report(kind: str, *fields: object) -> None:
    data = memoryview(json.dumps([kind, *fields]).encode() + b"\n")
    while data:
        data = data[os.write(RESULT_FD, data) :]  # type: ignore[name-defined]  # noqa: F821  (given by inside_start.py)


def _silence() -> None:
    """Give standard streams to the void: a candidate's prints reach nobody and cost nothing."""
    void = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(void, fd)
    os.close(void)


def _main() -> None:
    # Read before the candidate can touch the builtins; a candidate that patches `json` harms itself only.
    job = json.load(sys.stdin)
    function, inputs = job["function"], job["inputs"]
    _silence()
    namespace: dict[str, object] = {"__name__": "candidate"}
    try:
        exec(compile(job["source"], "candidate.py", "exec"), namespace)
        target = namespace[function]
    except KeyError as error:
        why = f"no function {function!r}" if error.args == (function,) else _describe(error)
        _report("end", why)
        return
    except BaseException as error:  # noqa: BLE001  (SystemExit at import is one of the tricks)
        _report("end", _describe(error))
        return
    for arguments in inputs:
        try:
            outcome = (True, _plain(target(*arguments)))  # type: ignore[operator]
            json.dumps(outcome[1])
        except BaseException as error:  # noqa: BLE001  (the candidate may raise anything)
            outcome = (False, _describe(error))
        _report("case", *outcome)
    _report("end", "")


_main()
os._exit(0)  # No atexit hook, thread or destructor of the candidate gets a last word.
