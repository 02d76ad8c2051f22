"""The chat encoding of DeepSeek-V4: message lists to text, and a finished assistant turn back to a message.

The release ships no template; the text below is a format, and one wrong byte puts a prompt outside the model's training data. Messages and
a turn that a model wrote are both read strictly: what does not fit is an `EncodingError`, never a guess.

Source: DeepSeek-V4 report, section 5.1.1, tables 3 and 4; the release's description of its encoding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from model.dsml import DSML, EncodingError, checked_text, parse_calls, unexpected
from model.encoding_turns import TASK_NAMES, Turn, read_turns

Message = dict[str, Any]

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
REMINDER = "<｜latest_reminder｜>"
THINK = "<think>"
END_THINK = "</think>"
TASKS = {name: f"<｜{name}｜>" for name in TASK_NAMES}
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

    Ends ready for generation (`<｜Assistant｜>` and a thinking token) after a user's turn, and with EOS after an assistant's. A turn's
    `task` ends it with a token of its own: `action` after the thinking token, the others after the turn's own text or EOS.

    Args:
        messages: turns to render; `tools` on a system or developer turn switches the dropping of old reasoning off.
        thinking_mode: `thinking` or `chat`.
        context: turns already rendered; they decide how `messages` are rendered and are not repeated.
        drop_thinking: leave out the reasoning of turns before the last user turn, and developer turns before it.
        add_default_bos_token: begin with BOS where there is no context.
        reasoning_effort: None, `high` or `max`; `max` puts a fixed instruction first when the model is to think, `high` adds nothing.

    Raises:
        EncodingError: an unknown mode or effort, or a bad message; names its number, the field, the value and what was expected.
    """
    _check_mode(thinking_mode)
    if reasoning_effort not in EFFORTS:
        raise unexpected("reasoning_effort", reasoning_effort, "None, 'high' or 'max'")
    before = read_turns(context or [], where="context")
    after = read_turns(messages, where="messages", before=before)
    drop = drop_thinking and thinking_mode == "thinking" and not any(turn.tools for turn in before + after)
    text = BOS if add_default_bos_token and not before else ""
    if reasoning_effort == "max" and thinking_mode == "thinking" and after and not before:
        text += _MAX_EFFORT
    turns, start = _without_old_developers(before, after) if drop else (before + after, len(before))
    last_user = _last_user(turns)
    for index in range(start, len(turns)):
        thinks = thinking_mode == "thinking" and (not drop or index >= last_user)
        text += _render(turns, index, thinks=thinks) + _transition(turns, index, thinks=thinks, thinking_mode=thinking_mode)
    return text


def continuation(messages_so_far: Sequence[Message], new_messages: Sequence[Message], thinking_mode: str) -> str:
    """Render what follows the model's EOS when new turns arrive: `<｜User｜>` ... `<｜Assistant｜>` and a thinking token.

    What was sampled stays as it was sampled, so reasoning is never dropped here.

    Raises:
        EncodingError: a bad message, or the new turns do not end with a user's or a tool's.
    """
    text = encode_messages(new_messages, thinking_mode, context=messages_so_far, drop_thinking=False, add_default_bos_token=False)
    if not new_messages or new_messages[-1]["role"] not in ("user", "developer", "tool"):
        raise EncodingError("continuation: the new messages must end with a user, developer or tool message")
    return text


def parse_message(text: str, thinking_mode: str) -> Message:
    """Parse one assistant turn as the model wrote it, from after the opening thinking token to EOS.

    Returns:
        `role`, `reasoning_content` (empty in chat mode), `content` and `tool_calls` (each with its `arguments` as JSON text). Rendering it
        again never fails, and gives the same message when parsed.

    Raises:
        EncodingError: no EOS at the end, no end of thinking, a special token where text belongs, or tool calls that are not well formed.
    """
    _check_mode(thinking_mode)
    checked_text(text, where="the turn")
    if not text.endswith(EOS):
        raise EncodingError(f"the turn does not end with {EOS}")
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


def _render(turns: list[Turn], index: int, *, thinks: bool) -> str:
    turn = turns[index]
    if turn.role == "system":
        return turn.text + _attachments(turn)
    if turn.role in ("user", "developer"):
        return USER + turn.text + _attachments(turn)
    if turn.role == "latest_reminder":
        return REMINDER + turn.text
    answers_a_task = index > 0 and turns[index - 1].task is not None
    reasoning = turn.reasoning + END_THINK if thinks and not answers_a_task else ""
    return reasoning + turn.text + turn.calls + (EOS if turn.ends else "")


def _transition(turns: list[Turn], index: int, *, thinks: bool, thinking_mode: str) -> str:
    """Return what stands between a turn and what the model says next; nothing where somebody else speaks next."""
    if index + 1 < len(turns) and turns[index + 1].role not in ("assistant", "latest_reminder"):
        return ""
    task = turns[index].task
    if task == "action":
        return ASSISTANT + (THINK if thinking_mode == "thinking" else END_THINK) + TASKS[task]
    if task is not None:
        return TASKS[task]
    if turns[index].role in ("user", "developer"):
        return ASSISTANT + (THINK if thinks else END_THINK)
    return ""


def _attachments(turn: Turn) -> str:
    text = ""
    if turn.tools:
        text += "\n\n" + _TOOLS_HEAD + "\n".join(turn.tools) + _TOOLS_TAIL
    if turn.response_format is not None:
        text += "\n\n" + _RESPONSE_FORMAT + turn.response_format
    return text


def _check_mode(thinking_mode: str) -> None:
    if thinking_mode not in THINKING_MODES:
        raise unexpected("thinking_mode", thinking_mode, " or ".join(map(repr, THINKING_MODES)))


def _without_old_developers(before: list[Turn], after: list[Turn]) -> tuple[list[Turn], int]:
    """Drop the developer turns before the last user turn; returns the turns and where those of `after` start."""
    turns = before + after
    last_user = _last_user(turns)
    kept = [index for index, turn in enumerate(turns) if index >= last_user or turn.role != "developer"]
    return [turns[index] for index in kept], sum(index < len(before) for index in kept)


def _last_user(turns: list[Turn]) -> int:
    return max((index for index, turn in enumerate(turns) if turn.role in ("user", "developer")), default=-1)


def _refuse_special_tokens(text: str) -> None:
    for token in SPECIAL_TOKENS:
        if token in text:
            raise EncodingError(f"the turn has {token} where text belongs")
