"""The chat encoding of DeepSeek-V4: message lists to text, and a finished assistant turn back to a message.

The release ships no template; the text below is a format, and one wrong byte puts a prompt outside the model's training data. A turn that a
model wrote is parsed strictly: what this module would not have written is an `EncodingError`, never a guess.

Source: DeepSeek-V4 report, section 5.1.1, tables 3 and 4; the release's description of its encoding.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from model.dsml import DSML, EncodingError, parse_calls, render_calls

Message = dict[str, Any]

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
REMINDER = "<｜latest_reminder｜>"
THINK = "<think>"
END_THINK = "</think>"
TASKS = {name: f"<｜{name}｜>" for name in ("action", "query", "authority", "domain", "title", "read_url")}
EXTRACTED_URL = "<｜extracted_url｜>"
SPECIAL_TOKENS = [BOS, EOS, USER, ASSISTANT, REMINDER, THINK, END_THINK, DSML, *TASKS.values(), EXTRACTED_URL]
"""Every string that is one token of its own; a tokenizer gives the first two the ids 0 and 1."""

THINKING_MODES = ("chat", "thinking")
EFFORTS = (None, "high", "max")

_MAX_EFFORT = (
    "Reasoning Effort: Absolute maximum with no shortcuts permitted.\n"
    "You MUST be very thorough in your thinking and comprehensively decompose the problem to resolve the root cause, rigorously "
    "stress-testing your logic against all potential paths, edge cases, and adversarial scenarios.\n"
    "Explicitly write out your entire deliberation process, documenting every intermediate step, considered alternative, and rejected "
    "hypothesis to ensure absolutely no assumption is left unchecked.\n\n"
)
_TOOLS_HEAD = (
    "## Tools\n\n"
    "You have access to a set of tools to help answer the user's question. "
    f'You can invoke tools by writing a "<{DSML}tool_calls>" block like the following:\n\n'
    f"<{DSML}tool_calls>\n"
    f'<{DSML}invoke name="$TOOL_NAME">\n'
    f'<{DSML}parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</{DSML}parameter>\n'
    "...\n"
    f"</{DSML}invoke>\n"
    f'<{DSML}invoke name="$TOOL_NAME2">\n'
    "...\n"
    f"</{DSML}invoke>\n"
    f"</{DSML}tool_calls>\n\n"
    'String parameters should be specified as is and set `string="true"`. For all other types (numbers, booleans, arrays, objects), '
    'pass the value in JSON format and set `string="false"`.\n\n'
    f"If thinking_mode is enabled (triggered by {THINK}), you MUST output your complete reasoning inside {THINK}...{END_THINK} BEFORE any "
    "tool calls or final response.\n\n"
    f"Otherwise, output directly after {END_THINK} with tool calls or final response.\n\n"
    "### Available Tool Schemas\n\n"
)
_TOOLS_TAIL = "\n\nYou MUST strictly follow the above defined tool name and parameter schemas to invoke tool calls.\n"
_RESPONSE_FORMAT = "## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"


def encode_messages(
    messages: Sequence[Message],
    thinking_mode: str,
    *,
    context: Sequence[Message] | None = None,
    drop_thinking: bool = True,
    add_default_bos_token: bool = True,
    reasoning_effort: str | None = None,
) -> str:
    """Render messages as the text that the model reads.

    Ends ready for generation (`<｜Assistant｜>` and a thinking token) after a user's turn, and with EOS after an assistant's.

    Args:
        messages: turns to render; `tools` on a system or developer turn switches the dropping of old reasoning off.
        thinking_mode: `thinking` or `chat`.
        context: turns already rendered; they decide how `messages` are rendered and are not repeated.
        drop_thinking: leave out the reasoning of turns before the last user turn, and developer turns before it.
        add_default_bos_token: begin with BOS where there is no context.
        reasoning_effort: None, `high` or `max`; `max` puts a fixed instruction first.

    Raises:
        EncodingError: an unknown mode, effort, role or task, or a message without what its role needs.
    """
    if thinking_mode not in THINKING_MODES:
        raise EncodingError(f"thinking_mode: got {thinking_mode!r}, expected one of {THINKING_MODES}")
    if reasoning_effort not in EFFORTS:
        raise EncodingError(f"reasoning_effort: got {reasoning_effort!r}, expected one of {EFFORTS}")
    before = _merge_tool_results(context or [], [])
    turns = before + _merge_tool_results(messages, before)
    drop = drop_thinking and thinking_mode == "thinking" and not any(turn.get("tools") for turn in turns)
    start = len(before)
    if drop:
        start = len(_drop_old_developers(before))
        turns = _drop_old_developers(turns)
    last_user = _last_user(turns)
    text = BOS if add_default_bos_token and not before else ""
    if reasoning_effort == "max" and thinking_mode == "thinking" and start == 0:
        text += _MAX_EFFORT
    for index in range(start, len(turns)):
        thinks = thinking_mode == "thinking" and (not drop or index >= last_user)
        text += _render(turns, index, thinks=thinks) + _transition(turns, index, thinks=thinks, thinking_mode=thinking_mode)
    return text


def continuation(messages_so_far: Sequence[Message], new_messages: Sequence[Message], thinking_mode: str) -> str:
    """Render what follows the model's EOS when new turns arrive: `<｜User｜>` ... `<｜Assistant｜>` and a thinking token.

    What was sampled stays as it was sampled, so reasoning is never dropped here.

    Raises:
        EncodingError: the new turns do not end with a user's or a tool's.
    """
    if not new_messages or new_messages[-1].get("role") not in ("user", "developer", "tool"):
        raise EncodingError("continuation: the new messages must end with a user, developer or tool message")
    return encode_messages(new_messages, thinking_mode, context=messages_so_far, drop_thinking=False, add_default_bos_token=False)


def parse_message(text: str, thinking_mode: str) -> Message:
    """Parse one assistant turn as the model wrote it, from after the opening thinking token to EOS.

    Returns:
        `role`, `reasoning_content` (empty in chat mode), `content` and `tool_calls` (each with its `arguments` as JSON text).

    Raises:
        EncodingError: anything that `encode_messages` would not have written.
    """
    if thinking_mode not in THINKING_MODES:
        raise EncodingError(f"thinking_mode: got {thinking_mode!r}, expected one of {THINKING_MODES}")
    if not text.endswith(EOS):
        raise EncodingError("the turn does not end with the end-of-sentence token")
    body = text[: -len(EOS)]
    reasoning = ""
    if thinking_mode == "thinking":
        reasoning, found, body = body.partition(END_THINK)
        if not found:
            raise EncodingError(f"the turn has no {END_THINK}")
    content, found, block = body.partition(f"\n\n<{DSML}tool_calls")
    for part in (reasoning, content):
        _refuse_special_tokens(part)
    calls = parse_calls(f"<{DSML}tool_calls{block}") if found else []
    for call in calls:
        _refuse_special_tokens(call["function"]["name"] + call["function"]["arguments"])
    return {"role": "assistant", "reasoning_content": reasoning, "content": content, "tool_calls": calls}


def boilerplate() -> list[str]:
    """Return the constant strings of the encoding that a small tokenizer may hold as one token each: the tools preamble, call syntax."""
    return [
        _TOOLS_HEAD,
        _TOOLS_TAIL,
        f'\n\n<{DSML}tool_calls>\n<{DSML}invoke name="',
        f'">\n<{DSML}parameter name="',
        '" string="true">',
        '" string="false">',
        f'</{DSML}parameter>\n<{DSML}parameter name="',
        f'</{DSML}parameter>\n</{DSML}invoke>\n<{DSML}invoke name="',
        f"</{DSML}parameter>\n</{DSML}invoke>\n</{DSML}tool_calls>",
        "<tool_result>",
        "</tool_result>",
        "</tool_result>\n\n<tool_result>",
    ]


def schema_line(tool: Mapping[str, Any]) -> str:
    """Return a tool's line in the tools block; `tool` is a function schema, bare or under `function`."""
    return _to_json(tool.get("function", tool))


def _render(turns: list[Message], index: int, *, thinks: bool) -> str:
    turn = turns[index]
    role, content = turn.get("role"), turn.get("content") or ""
    if role == "system":
        return content + _attachments(turn)
    if role == "developer":
        if not content:
            raise EncodingError("a developer message needs content")
        return USER + content + _attachments(turn)
    if role == "user":
        return USER + "\n\n".join(part for _, part in turn["parts"])
    if role == "latest_reminder":
        return REMINDER + content
    if role != "assistant":
        raise EncodingError(f"role: got {role!r}, expected system, user, assistant, tool, developer or latest_reminder")
    answers_a_task = index > 0 and turns[index - 1].get("task") is not None
    reasoning = (turn.get("reasoning_content") or "") + END_THINK if thinks and not answers_a_task else ""
    return reasoning + content + render_calls(turn.get("tool_calls") or []) + ("" if turn.get("wo_eos") else EOS)


def _transition(turns: list[Message], index: int, *, thinks: bool, thinking_mode: str) -> str:
    if index + 1 < len(turns) and turns[index + 1].get("role") not in ("assistant", "latest_reminder"):
        return ""
    task = turns[index].get("task")
    if task is not None and task not in TASKS:
        raise EncodingError(f"task: got {task!r}, expected one of {sorted(TASKS)}")
    if task == "action":
        return ASSISTANT + (THINK if thinking_mode == "thinking" else END_THINK) + TASKS[task]
    if task is not None:
        return TASKS[task]
    if turns[index]["role"] in ("user", "developer"):
        return ASSISTANT + (THINK if thinks else END_THINK)
    return ""


def _attachments(turn: Message) -> str:
    text = ""
    if turn.get("tools"):
        text += "\n\n" + _TOOLS_HEAD + "\n".join(schema_line(tool) for tool in turn["tools"]) + _TOOLS_TAIL
    if turn.get("response_format"):
        text += "\n\n" + _RESPONSE_FORMAT + _to_json(turn["response_format"])
    return text


def _merge_tool_results(messages: Sequence[Message], before: list[Message]) -> list[Message]:
    """Turn tool messages into parts of user turns, ordered as the calls they answer, and join neighbouring user turns."""
    order: dict[str, int] = {}
    for turn in before:
        order = _call_order(turn) or order
    merged: list[Message] = []
    for message in messages:
        role = message.get("role")
        if role not in ("user", "tool"):
            order = _call_order(message) or order
            merged.append(dict(message))
            continue
        part = _part(message, order)
        if merged and merged[-1]["role"] == "user" and merged[-1].get("task") is None:
            merged[-1]["parts"].append(part)
        else:
            merged.append({"role": "user", "parts": [part]})
        if message.get("task") is not None:
            merged[-1]["task"] = message["task"]
    for turn in merged:
        if "parts" in turn:
            turn["parts"] = _in_call_order(turn["parts"])
    return merged


def _part(message: Message, order: dict[str, int]) -> tuple[int | None, str]:
    content = message.get("content") or ""
    if isinstance(content, list):
        content = "\n\n".join(block["text"] if block.get("type") == "text" else f"[Unsupported {block.get('type')}]" for block in content)
    if message["role"] == "user":
        return None, content
    return order.get(message.get("tool_call_id", ""), 0), f"<tool_result>{content}</tool_result>"


def _in_call_order(parts: list[tuple[int | None, str]]) -> list[tuple[int | None, str]]:
    """Sort the tool results among the places that tool results take; user text keeps its place."""
    results = iter(sorted((part for part in parts if part[0] is not None), key=lambda part: part[0] or 0))
    return [part if part[0] is None else next(results) for part in parts]


def _call_order(turn: Message) -> dict[str, int]:
    if turn.get("role") != "assistant":
        return {}
    return {call["id"]: index for index, call in enumerate(turn.get("tool_calls") or []) if call.get("id")}


def _drop_old_developers(turns: list[Message]) -> list[Message]:
    last = _last_user(turns)
    return [turn for index, turn in enumerate(turns) if index >= last or turn.get("role") != "developer"]


def _last_user(turns: list[Message]) -> int:
    return max((index for index, turn in enumerate(turns) if turn.get("role") in ("user", "developer")), default=-1)


def _refuse_special_tokens(text: str) -> None:
    for token in SPECIAL_TOKENS:
        if token in text:
            raise EncodingError(f"the turn has {token} where text belongs")


def _to_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
