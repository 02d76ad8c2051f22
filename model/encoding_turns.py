"""What a conversation says, checked: messages as users give them to the turns that the chat encoding renders.

Every message is checked here, so that a bad one is refused by its number and field before anything is rendered. Tool messages have no
turn of their own in V4: their results become parts of a user's turn.

Source: the release's description of its encoding, "Roles" and "Tool Calling"; what it leaves open is marked as ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from model.dsml import checked_text, render_calls, to_json, unexpected

ROLES = ("system", "user", "developer", "latest_reminder", "assistant", "tool")
TASK_NAMES = ("action", "query", "authority", "domain", "title", "read_url")

_ONLY_IN = {
    "tools": ("system", "developer"),
    "response_format": ("system", "developer"),
    "tool_calls": ("assistant",),
    "reasoning_content": ("assistant",),
    "task": ("user", "developer", "assistant"),
}
"""Fields that mean something in these roles alone; elsewhere they must be absent or empty (ours: the release drops them silently)."""


@dataclass
class Turn:
    """A turn, ready to be rendered.

    Attributes:
        role: one of `ROLES` but `tool`.
        parts: (place among the calls that it answers, text) of a tool result, (None, text) of anything else.
        reasoning: what an assistant thought.
        calls: an assistant's tool calls, rendered.
        call_order: id of each call to its place; None in a turn without calls.
        tools: JSON of each tool's schema.
        response_format: JSON of the schema to reply in.
        task: the quick instruction that follows the turn.
        ends: whether EOS ends an assistant's turn.
    """

    role: str
    parts: list[tuple[int | None, str]]
    reasoning: str = ""
    calls: str = ""
    call_order: dict[str, int] | None = None
    tools: list[str] = field(default_factory=list)
    response_format: str | None = None
    task: str | None = None
    ends: bool = True

    @property
    def text(self) -> str:
        """The parts with a blank line between them."""
        return "\n\n".join(text for _, text in self.parts)


def read_turns(messages: object, *, where: str, before: Sequence[Turn] = ()) -> list[Turn]:
    """Check messages and make turns of them.

    Tool results join the user's turn before them, or begin one; a user's text joins it too, unless that turn has a task. The results of one
    turn are put in the order of the calls of the last assistant turn that made any; a result of none of them counts as the first call's.

    Args:
        messages: a list of messages.
        where: what they are called in errors.
        before: the turns before them, whose calls they may answer.

    Raises:
        EncodingError: names the message, the field, its value and what was expected.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        raise unexpected(where, messages, "a list of messages")
    order = next((turn.call_order for turn in reversed(before) if turn.call_order is not None), {})
    turns: list[Turn] = []
    for index, message in enumerate(messages):
        role = _role(message, f"{where}[{index}]")
        turn = _read(message, role, where=f"{where}[{index}]", order=order)
        order = order if turn.call_order is None else turn.call_order
        last = turns[-1] if turns else None
        if last is not None and last.role == "user" and (role == "tool" or (role == "user" and last.task is None)):
            last.parts += turn.parts
            last.task = last.task or turn.task
        else:
            turns.append(turn)
    for turn in turns:
        turn.parts = _in_call_order(turn.parts)
    return turns


def schema_json(tool: object, *, where: str) -> str:
    """Return the JSON of a tool's function schema, given bare or under `function`.

    Raises:
        EncodingError: it has no name, or is not JSON.
    """
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise unexpected(where, tool, 'a tool: {"type": "function", "function": {"name", ...}}')
    return to_json(dict(function), where=where)


def _role(message: object, where: str) -> str:
    if not isinstance(message, Mapping):
        raise unexpected(where, message, "a message: an object with `role` and `content`")
    role = message.get("role")
    if role not in ROLES:
        raise unexpected(f"{where}.role", role, f"one of {', '.join(ROLES)}")
    for name, roles in _ONLY_IN.items():
        if message.get(name) and role not in roles:
            raise unexpected(f"{where}.{name}", message[name], f"none in a {role} message, only in {' or '.join(roles)}")
    return str(role)


def _read(message: Mapping[str, object], role: str, *, where: str, order: dict[str, int]) -> Turn:
    """Return the turn that one message alone would be."""
    text = _text(message.get("content"), f"{where}.content")
    if role == "tool":
        id = message.get("tool_call_id")
        if id is not None and not isinstance(id, str):
            raise unexpected(f"{where}.tool_call_id", id, "the id of a tool call")
        return Turn("user", [(order.get(id or "", 0), f"<tool_result>{text}</tool_result>")])
    if role == "developer" and not text:
        raise unexpected(f"{where}.content", message.get("content"), "text, which a developer message needs")
    turn = Turn(role, [(None, text)], task=_task(message.get("task"), f"{where}.task"))
    if message.get("tools"):
        tools = _list(message["tools"], f"{where}.tools", "a list of tools")
        turn.tools = [schema_json(tool, where=f"{where}.tools[{index}]") for index, tool in enumerate(tools)]
    if message.get("response_format"):
        turn.response_format = to_json(message["response_format"], where=f"{where}.response_format")
    if role == "assistant":
        _read_assistant(turn, message, where)
    return turn


def _read_assistant(turn: Turn, message: Mapping[str, object], where: str) -> None:
    turn.reasoning = _text(message.get("reasoning_content"), f"{where}.reasoning_content")
    wo_eos = message.get("wo_eos")
    if wo_eos not in (None, False, True):
        raise unexpected(f"{where}.wo_eos", wo_eos, "true or false")
    turn.ends = not wo_eos
    if message.get("tool_calls"):
        calls = _list(message["tool_calls"], f"{where}.tool_calls", "a list of tool calls")
        turn.calls = render_calls(calls, where=f"{where}.tool_calls")
        turn.call_order = {id: index for index, call in enumerate(calls) if (id := _call_id(call, f"{where}.tool_calls[{index}].id"))}


def _call_id(call: object, where: str) -> str | None:
    assert isinstance(call, Mapping)  # rendered before
    id = call.get("id") or call.get("function", call).get("id")
    if id is not None and not isinstance(id, str):
        raise unexpected(where, id, "the id of a tool call")
    return id


def _task(task: object, where: str) -> str | None:
    if task is None:
        return None
    if task not in TASK_NAMES:
        raise unexpected(where, task, f"one of {', '.join(TASK_NAMES)}")
    return str(task)


def _text(content: object, where: str) -> str:
    """Return the text of a message, given as text, as a list of content parts, or not at all."""
    if content is None:
        return ""
    if isinstance(content, str):
        return checked_text(content, where=where)
    parts = _list(content, where, "text or a list of content parts")
    return "\n\n".join(_part(part, f"{where}[{index}]") for index, part in enumerate(parts))


def _part(part: object, where: str) -> str:
    if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
        raise unexpected(where, part, 'a content part: {"type": "text", "text"}')
    if part["type"] != "text":
        return f"[Unsupported {part['type']}]"
    if not isinstance(part.get("text"), str):
        raise unexpected(f"{where}.text", part.get("text"), "text")
    return checked_text(part["text"], where=f"{where}.text")


def _list(value: object, where: str, expected: str) -> Sequence[object]:
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise unexpected(where, value, expected)
    return value


def _in_call_order(parts: list[tuple[int | None, str]]) -> list[tuple[int | None, str]]:
    """Sort the tool results among the places that tool results take; user text keeps its place."""
    results = iter(sorted((part for part in parts if part[0] is not None), key=lambda part: part[0] or 0))
    return [part if part[0] is None else next(results) for part in parts]
