"""Tool calls in DSML, the markup that DeepSeek-V4 writes them in: calls to text and text to calls.

What one direction writes the other reads back unchanged; a call that the markup cannot hold is refused when it is rendered.

Source: DeepSeek-V4 report, section 5.1.1, table 4.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

DSML = "｜DSML｜"
MAX_DEPTH = 128
"""Levels of lists and objects in an argument; ours: whoever reads the arguments later recurses into them, on a stack already in use."""

_PARAMETER = re.compile(r'(.*?)" string="(true|false)">(.*)', re.DOTALL)
_OPEN, _CLOSE = f"<{DSML}tool_calls>\n", f"</{DSML}tool_calls>"

_Written = tuple[str, list[tuple[str, str, str]]]
"""A call as the markup holds it: its name, and name, `true` or `false`, and text of each parameter."""

_shorten = reprlib.Repr()
_shorten.maxstring = _shorten.maxother = 60


class EncodingError(ValueError):
    """A message that cannot be encoded, or text that is not an encoded assistant turn."""


def unexpected(where: str, value: object, expected: str) -> EncodingError:
    """Return the error for a value that cannot be encoded: where it stands, the value in short, what was expected."""
    try:
        shown = _shorten.repr(value)
    except ValueError:  # an integer of more digits than Python prints
        shown = f"a number too long to print ({type(value).__name__})"
    return EncodingError(f"{where}: got {shown}, expected {expected}")


def render_calls(calls: Sequence[object], *, where: str = "tool_calls") -> str:
    """Render tool calls as the block that ends an assistant turn; empty for no calls.

    Args:
        calls: each `{"function": {"name", "arguments"}}` or the inner mapping alone; arguments as JSON text or as a mapping.
        where: the place of the calls, for errors.

    Raises:
        EncodingError: a call without a name, arguments that are not a JSON object, or either holding the markup itself.
    """
    if not calls:
        return ""
    invokes = [_render_call(call, f"{where}[{index}]") for index, call in enumerate(calls)]
    return f"\n\n{_OPEN}" + "".join(invokes) + _CLOSE


def parse_calls(text: str) -> list[dict[str, Any]]:
    """Parse a tool-call block that reaches to the end of `text`.

    Returns:
        One `{"type": "function", "function": {"name", "arguments"}}` a call, arguments as JSON text in the order written.

    Raises:
        EncodingError: anything but a block that is properly closed, or values that are not what they say.
    """
    if not text.startswith(_OPEN) or not text.endswith(_CLOSE):
        raise EncodingError("tool calls: the block is not opened, closed and ended as it must be")
    calls = [_read_call(name, parameters) for name, parameters in _split(text[len(_OPEN) : -len(_CLOSE)])]
    if not calls:
        raise EncodingError("tool calls: the block is empty")
    return calls


def to_json(value: object, *, where: str) -> str:
    """Return `value` as JSON on one line, characters beyond ASCII as they are.

    Raises:
        EncodingError: it is not JSON (NaN and infinity are not), is nested deeper than `MAX_DEPTH`, or is not Unicode text.
    """
    if not _is_shallow(value):
        raise unexpected(where, value, f"JSON nested at most {MAX_DEPTH} deep")
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise unexpected(where, value, f"JSON ({error})") from error
    return checked_text(text, where=where)


def checked_text(text: str, *, where: str) -> str:
    """Return `text` itself.

    Raises:
        EncodingError: it has half a surrogate pair, which no tokenizer and no file can hold.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise unexpected(where, text[error.start], "Unicode text, half a surrogate pair is none") from error
    return text


def _render_call(call: object, where: str) -> str:
    name, arguments = _function(call, where)
    parameters = [_written(key, value, f"{where}.function.arguments[{key!r}]") for key, value in arguments.items()]
    lines = [f'<{DSML}parameter name="{key}" string="{flag}">{text}</{DSML}parameter>' for key, flag, text in parameters]
    invoke = f'<{DSML}invoke name="{name}">\n' + "\n".join(lines) + f"\n</{DSML}invoke>\n"
    try:
        unchanged = _split(invoke) == [(name, parameters)]
    except EncodingError:
        unchanged = False
    if not unchanged:
        raise unexpected(where, call, f"names and values that the call's own markup can hold, so none with {DSML}")
    return invoke


def _function(call: object, where: str) -> tuple[str, dict[str, Any]]:
    """Return name and arguments of a call, checked."""
    if not isinstance(call, Mapping):
        raise unexpected(where, call, "a tool call: an object with `function`")
    function = call.get("function", call)
    if not isinstance(function, Mapping):
        raise unexpected(f"{where}.function", function, "an object with `name` and `arguments`")
    name, arguments = function.get("name"), function.get("arguments")
    if not isinstance(name, str) or not name:
        raise unexpected(f"{where}.function.name", name, "the name of a tool")
    checked_text(name, where=f"{where}.function.name")
    return name, _object(arguments, f"{where}.function.arguments")


def _object(arguments: object, where: str) -> dict[str, Any]:
    expected = "a JSON object, as text or as a mapping"
    if isinstance(arguments, str):
        try:
            arguments = _load(arguments)
        except ValueError as error:
            raise unexpected(where, arguments, f"{expected} ({error})") from error
    if not isinstance(arguments, Mapping) or not all(isinstance(key, str) for key in arguments):
        raise unexpected(where, arguments, expected)
    if not _is_shallow(arguments):
        raise unexpected(where, arguments, f"{expected}, nested at most {MAX_DEPTH} deep")
    return dict(arguments)


def _written(key: str, value: object, where: str) -> tuple[str, str, str]:
    checked_text(key, where=where)
    if isinstance(value, str):
        return key, "true", checked_text(value, where=where)
    return key, "false", to_json(value, where=where)


def _read_call(name: str, parameters: list[tuple[str, str, str]]) -> dict[str, Any]:
    arguments: dict[str, Any] = {}
    for key, flag, text in parameters:
        if key in arguments:
            raise EncodingError(f"tool calls: parameter {key!r} of {name!r} is given twice")
        try:
            arguments[key] = text if flag == "true" else _load(text)
        except ValueError as error:
            raise EncodingError(f"tool calls: parameter {key!r} of {name!r} is not JSON: {text[:40]!r} ({error})") from error
    if not _is_shallow(arguments):
        raise EncodingError(f"tool calls: the arguments of {name!r} are nested deeper than {MAX_DEPTH}")
    encoded = checked_text(json.dumps(arguments, ensure_ascii=False), where=f"tool calls: arguments of {name!r}")
    if DSML in encoded:
        raise EncodingError(f"tool calls: the arguments of {name!r} spell {DSML} in escapes")
    return {"type": "function", "function": {"name": name, "arguments": encoded}}


def _split(body: str) -> list[_Written]:
    """Cut the inside of a tool-call block into its calls, and those into their parameters; time linear in the text."""
    calls: list[_Written] = []
    for inside in _elements(body, "invoke"):
        name, found, rest = inside.partition('">\n')
        if not found or not name or DSML in name:
            raise EncodingError(f"tool calls: a call has no proper name: {inside[:40]!r}")
        parameters = []
        for parameter in _elements("" if rest == "\n" else rest, "parameter"):
            match = _PARAMETER.fullmatch(parameter)
            if match is None or DSML in parameter:
                raise EncodingError(f"tool calls: a parameter of {name!r} is not opened or closed as it must be: {parameter[:40]!r}")
            parameters.append((match[1], match[2], match[3]))
        calls.append((name, parameters))
    return calls


def _elements(text: str, what: str) -> list[str]:
    """Return what is between the quote that opens an element's name and its closing tag, for elements back to back, one after a line."""
    head, tail = f'<{DSML}{what} name="', f"</{DSML}{what}>\n"
    found, position = [], 0
    while position < len(text):
        end = text.find(tail, position) if text.startswith(head, position) else -1
        if end < 0:
            raise EncodingError(f"tool calls: expected <{DSML}{what} ...> and its end at {text[position : position + 40]!r}")
        found.append(text[position + len(head) : end])
        position = end + len(tail)
    return found


def _load(text: str) -> Any:
    """Read strict JSON: finite numbers, each key of an object once."""
    try:
        return json.loads(text, parse_constant=_refuse, parse_float=_finite, object_pairs_hook=_unique)
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"{text[:20]} is beyond a float")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("an object has a key twice")
    return value


def _is_shallow(value: object) -> bool:
    """Return whether no container within `value` is more than `MAX_DEPTH` containers down."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [child for item in level for child in _children(item) if isinstance(child, Mapping | list | tuple)]
        if not level:
            return True
    return False


def _children(value: object) -> Iterable[object]:
    if isinstance(value, Mapping):
        return value.values()
    return value if isinstance(value, list | tuple) else ()
