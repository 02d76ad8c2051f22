"""Tool calls in DSML, the markup that DeepSeek-V4 writes them in: calls to text and text to calls.

Source: DeepSeek-V4 report, section 5.1.1, table 4.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

DSML = "｜DSML｜"
_MAX_BLOCK = 100_000
"""Characters of a tool-call block that are parsed at all; ours, bounds the work on hostile text."""

_CALL = re.compile(rf'<{DSML}invoke name="([^"\n]+)">\n(.*?)\n?</{DSML}invoke>\n', re.DOTALL)
_PARAMETER = re.compile(rf'<{DSML}parameter name="([^"\n]+)" string="(true|false)">(.*?)</{DSML}parameter>(?:\n|\Z)', re.DOTALL)


class EncodingError(ValueError):
    """A message that cannot be encoded, or text that is not an encoded assistant turn."""


def render_calls(calls: Sequence[Mapping[str, Any]]) -> str:
    """Render tool calls as the block that ends an assistant turn; empty for no calls.

    Args:
        calls: each `{"function": {"name", "arguments"}}` or the inner mapping alone; arguments as JSON text or as a dict.

    Raises:
        EncodingError: arguments that are not a JSON object.
    """
    if not calls:
        return ""
    invokes = [f'<{DSML}invoke name="{call["name"]}">\n{_render_arguments(call)}\n</{DSML}invoke>' for call in map(_function, calls)]
    return f"\n\n<{DSML}tool_calls>\n" + "\n".join(invokes) + f"\n</{DSML}tool_calls>"


def parse_calls(text: str) -> list[dict[str, Any]]:
    """Parse a tool-call block that reaches to the end of `text`.

    Returns:
        One `{"type": "function", "function": {"name", "arguments"}}` a call, arguments as JSON text in the order written.

    Raises:
        EncodingError: anything that `render_calls` would not have written.
    """
    head, tail = f"<{DSML}tool_calls>\n", f"</{DSML}tool_calls>"
    if len(text) > _MAX_BLOCK:
        raise EncodingError(f"tool calls: got {len(text)} characters, expected at most {_MAX_BLOCK}")
    if not text.startswith(head) or not text.endswith(tail):
        raise EncodingError("tool calls: the block is not opened, closed and ended as it must be")
    body = text[len(head) : -len(tail)]
    calls = [_call(match[1], match[2]) for match in _matches(_CALL, body, "invoke")]
    if not calls:
        raise EncodingError("tool calls: the block is empty")
    return calls


def _call(name: str, body: str) -> dict[str, Any]:
    arguments: dict[str, Any] = {}
    for match in _matches(_PARAMETER, body, "parameter"):
        key, value = match[1], match[3]
        if key in arguments:
            raise EncodingError(f"tool calls: parameter {key!r} of {name!r} is given twice")
        if DSML in value:
            raise EncodingError(f"tool calls: parameter {key!r} of {name!r} is not closed")
        arguments[key] = value if match[2] == "true" else _json_value(key, value)
    return {"type": "function", "function": {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}}


def _matches(pattern: re.Pattern[str], text: str, what: str) -> list[re.Match[str]]:
    """Match `pattern` back to back over the whole of `text`."""
    found, position = [], 0
    while position < len(text):
        match = pattern.match(text, position)
        if match is None:
            raise EncodingError(f"tool calls: expected <{DSML}{what} ...> at {text[position : position + 40]!r}")
        found.append(match)
        position = match.end()
    return found


def _json_value(key: str, text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise EncodingError(f"tool calls: parameter {key!r} is not JSON: {text[:40]!r}") from error


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _function(call: Mapping[str, Any]) -> Mapping[str, Any]:
    function = call.get("function", call)
    if "name" not in function or "arguments" not in function:
        raise EncodingError(f"a tool call needs name and arguments: got {sorted(function)}")
    return function


def _render_arguments(call: Mapping[str, Any]) -> str:
    arguments = call["arguments"]
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError as error:
            raise EncodingError(f"arguments of {call['name']!r} are not JSON: {arguments[:40]!r}") from error
    if not isinstance(arguments, Mapping):
        raise EncodingError(f"arguments of {call['name']!r}: got {type(arguments).__name__}, expected an object")
    return "\n".join(_render_parameter(key, value) for key, value in arguments.items())


def _render_parameter(key: str, value: Any) -> str:
    is_string = isinstance(value, str)
    text = value if is_string else json.dumps(value, ensure_ascii=False)
    return f'<{DSML}parameter name="{key}" string="{"true" if is_string else "false"}">{text}</{DSML}parameter>'
