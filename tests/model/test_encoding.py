"""The chat encoding, rule by rule: the release's pairs, and for each rule of its description the exact text."""

import json
from pathlib import Path

import pytest

from model.encoding import BOS, EOS, EncodingError, continuation, encode_messages

PAIRS = Path(__file__).parents[1] / "data" / "encoding"
SYSTEM = {"role": "system", "content": "S"}
USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "reasoning_content": "r", "content": "a"}
CLOCK = {"name": "clock", "parameters": {}}


def pair(number):
    data = json.loads((PAIRS / f"input_{number}.json").read_text())
    messages = data if isinstance(data, list) else data["messages"]
    if isinstance(data, dict):
        messages[0]["tools"] = data["tools"]
    return messages, (PAIRS / f"output_{number}.txt").read_text()


@pytest.mark.parametrize("number", [1, 2])
def test_golden_pair(number):
    messages, text = pair(number)
    assert encode_messages(messages, thinking_mode="thinking") == text


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("cut", range(1, 5))
def test_context_and_rest_join_to_the_whole(number, cut):
    messages, _ = pair(number)
    whole = encode_messages(messages, "thinking", drop_thinking=False)
    head = encode_messages(messages[:cut], "thinking", drop_thinking=False)
    assert head + encode_messages(messages[cut:], "thinking", context=messages[:cut], drop_thinking=False) == whole


@pytest.mark.parametrize(
    ("mode", "messages", "expected"),
    [
        ("chat", [SYSTEM, USER, ANSWER, USER], f"{BOS}S<｜User｜>q<｜Assistant｜></think>a{EOS}<｜User｜>q<｜Assistant｜></think>"),
        ("chat", [USER], f"{BOS}<｜User｜>q<｜Assistant｜></think>"),
        ("thinking", [SYSTEM, USER], f"{BOS}S<｜User｜>q<｜Assistant｜><think>"),
        ("thinking", [USER, ANSWER], f"{BOS}<｜User｜>q<｜Assistant｜><think>r</think>a{EOS}"),
        ("thinking", [USER, {"role": "assistant", "content": "a"}], f"{BOS}<｜User｜>q<｜Assistant｜><think></think>a{EOS}"),
        ("thinking", [USER, USER], f"{BOS}<｜User｜>q\n\nq<｜Assistant｜><think>"),
        ("thinking", [SYSTEM, USER, SYSTEM, USER], f"{BOS}S<｜User｜>qS<｜User｜>q<｜Assistant｜><think>"),
        ("thinking", [USER, ANSWER, ANSWER], f"{BOS}<｜User｜>q<｜Assistant｜><think>r</think>a{EOS}r</think>a{EOS}"),
        ("thinking", [SYSTEM], f"{BOS}S"),
        ("thinking", [], BOS),
    ],
    ids=["chat", "no-system", "thinking", "answered", "no-reasoning", "users-join", "systems", "two-answers", "system", "nothing"],
)
def test_roles_and_modes(mode, messages, expected):
    assert encode_messages(messages, mode) == expected


@pytest.mark.parametrize("role", ["system", "user", "latest_reminder", "tool"])
@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}, {"content": []}], ids=["missing", "none", "empty", "no-parts"])
def test_content_may_be_empty(role, content):
    message = {"role": role} | content
    assert encode_messages([message, USER], "chat") == encode_messages([message | {"content": ""}, USER], "chat")


@pytest.mark.parametrize("role", ["system", "user", "developer", "latest_reminder", "assistant", "tool"])
def test_content_may_be_a_list_of_parts(role):
    parts = [{"type": "text", "text": "one"}, {"type": "image_url", "image_url": {"url": "u"}}, {"type": "text", "text": ""}]
    joined = {"role": role, "content": "one\n\n[Unsupported image_url]\n\n"}
    assert encode_messages([{"role": role, "content": parts}], "thinking") == encode_messages([joined], "thinking")


def test_only_the_start_of_a_conversation_has_a_begin_of_sentence():
    assert encode_messages([SYSTEM, USER], "chat", add_default_bos_token=False) == "S<｜User｜>q<｜Assistant｜></think>"
    assert encode_messages([USER], "chat", context=[SYSTEM]) == "<｜User｜>q<｜Assistant｜></think>"
    assert encode_messages([USER], "chat", context=[]) == f"{BOS}<｜User｜>q<｜Assistant｜></think>"


# Dropping of old reasoning


def test_reasoning_before_the_last_user_turn_is_dropped():
    dropped = f"{BOS}<｜User｜>q<｜Assistant｜></think>a{EOS}<｜User｜>q<｜Assistant｜><think>r</think>a{EOS}"
    kept = f"{BOS}<｜User｜>q<｜Assistant｜><think>r</think>a{EOS}<｜User｜>q<｜Assistant｜><think>r</think>a{EOS}"
    messages = [USER, ANSWER, USER, ANSWER]
    assert encode_messages(messages, "thinking") == dropped
    assert encode_messages(messages, "thinking", drop_thinking=False) == kept
    assert encode_messages(messages, "chat", drop_thinking=False) == dropped.replace("<think>r", "")


@pytest.mark.parametrize("role", ["system", "developer"])
def test_tools_anywhere_keep_all_reasoning(role):
    tooled = {"role": role, "content": "T", "tools": [CLOCK]}
    for messages, context in (
        ([tooled, USER, ANSWER, USER], None),
        ([USER, ANSWER, USER], [tooled]),
        ([USER, ANSWER, tooled], [USER, ANSWER]),
    ):
        assert "<｜User｜>q<｜Assistant｜><think>r</think>a" in encode_messages(messages, "thinking", context=context)
    untooled = [tooled | {"tools": []}, USER, ANSWER, USER]
    assert "</think>a" in encode_messages(untooled, "thinking") and "r</think>" not in encode_messages(untooled, "thinking")


def test_tool_results_are_a_user_turn_to_the_dropping():
    messages = [USER, ANSWER | {"tool_calls": [{"function": {"name": "clock", "arguments": "{}"}}]}, {"role": "tool", "content": "9"}]
    text = encode_messages(messages, "thinking")
    assert text.startswith(f"{BOS}<｜User｜>q<｜Assistant｜></think>a\n\n<｜DSML｜tool_calls>")
    assert text.endswith("<｜User｜><tool_result>9</tool_result><｜Assistant｜><think>")


def test_developer_turns_before_the_last_user_turn_are_dropped():
    messages = [{"role": "developer", "content": "D"}, ANSWER, USER]
    assert encode_messages(messages, "thinking") == f"{BOS}a{EOS}<｜User｜>q<｜Assistant｜><think>"
    for kept in (encode_messages(messages, "thinking", drop_thinking=False), encode_messages(messages, "chat")):
        assert kept.startswith(f"{BOS}<｜User｜>D<｜Assistant｜>")
    assert encode_messages([SYSTEM, messages[0]], "thinking") == f"{BOS}S<｜User｜>D<｜Assistant｜><think>"


def test_context_decides_what_is_dropped_and_is_not_repeated():
    assert encode_messages([ANSWER, USER], "thinking", context=[USER]) == f"a{EOS}<｜User｜>q<｜Assistant｜><think>"
    developers = [{"role": "developer", "content": "old"}, ANSWER]
    assert (
        encode_messages([{"role": "developer", "content": "new"}], "thinking", context=developers) == "<｜User｜>new<｜Assistant｜><think>"
    )
    assert encode_messages([], "thinking", context=[USER]) == ""


# Reminders, effort, format, tasks


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([SYSTEM, "reminder", USER], "S<｜latest_reminder｜>R<｜User｜>q<｜Assistant｜><think>"),
        ([USER, "reminder", ANSWER], f"<｜User｜>q<｜Assistant｜><think><｜latest_reminder｜>Rr</think>a{EOS}"),
        (
            [USER, ANSWER, "reminder", USER],
            f"<｜User｜>q<｜Assistant｜></think>a{EOS}<｜latest_reminder｜>R<｜User｜>q<｜Assistant｜><think>",
        ),
        ([USER, "reminder", USER], "<｜User｜>q<｜Assistant｜></think><｜latest_reminder｜>R<｜User｜>q<｜Assistant｜><think>"),
    ],
    ids=["before-user", "before-assistant", "between", "users-do-not-join"],
)
def test_latest_reminder(messages, expected):
    reminder = {"role": "latest_reminder", "content": "R"}
    assert encode_messages([reminder if m == "reminder" else m for m in messages], "thinking") == BOS + expected


EFFORT = (
    "Reasoning Effort: Absolute maximum with no shortcuts permitted.\n"
    "You MUST be very thorough in your thinking and comprehensively decompose the problem to resolve the root cause, rigorously "
    "stress-testing your logic against all potential paths, edge cases, and adversarial scenarios.\n"
    "Explicitly write out your entire deliberation process, documenting every intermediate step, considered alternative, and rejected "
    "hypothesis to ensure absolutely no assumption is left unchecked.\n\n"
)


@pytest.mark.parametrize(
    ("mode", "effort", "options", "prefix"),
    [
        ("thinking", "max", {}, BOS + EFFORT),
        ("thinking", "max", {"add_default_bos_token": False}, EFFORT),
        ("thinking", "max", {"context": [USER, ANSWER]}, ""),
        ("thinking", "high", {}, BOS),
        ("thinking", None, {}, BOS),
        ("chat", "max", {}, BOS),
    ],
    ids=["max", "no-bos", "context", "high", "none", "chat"],
)
@pytest.mark.parametrize("first", [SYSTEM, USER], ids=["system", "user"])
def test_maximum_effort_comes_first(mode, effort, options, prefix, first):
    rest = encode_messages([first], mode, **options | {"add_default_bos_token": False})
    assert encode_messages([first], mode, reasoning_effort=effort, **options) == prefix + rest


def test_nothing_to_render_has_no_effort():
    assert encode_messages([], "thinking", reasoning_effort="max") == BOS


ROUTE = USER | {"task": "action"}
ROUTED = {"role": "assistant", "content": "Search"}


@pytest.mark.parametrize(
    ("messages", "chat", "thinking"),
    [
        ([ROUTE], "<｜User｜>q<｜Assistant｜></think><｜action｜>", "<｜User｜>q<｜Assistant｜><think><｜action｜>"),
        (
            [ROUTE, ROUTED],
            f"<｜User｜>q<｜Assistant｜></think><｜action｜>Search{EOS}",
            f"<｜User｜>q<｜Assistant｜><think><｜action｜>Search{EOS}",
        ),
        (
            [ROUTE, ROUTED, ANSWER],
            f"<｜User｜>q<｜Assistant｜></think><｜action｜>Search{EOS}a{EOS}",
            f"<｜User｜>q<｜Assistant｜><think><｜action｜>Search{EOS}r</think>a{EOS}",
        ),
        (
            [USER, ANSWER | {"task": "title"}],
            f"<｜User｜>q<｜Assistant｜></think>a{EOS}<｜title｜>",
            f"<｜User｜>q<｜Assistant｜><think>r</think>a{EOS}<｜title｜>",
        ),
        (
            [USER, ANSWER | {"task": "title"}, {"role": "assistant", "reasoning_content": "no", "content": "T"}],
            f"<｜User｜>q<｜Assistant｜></think>a{EOS}<｜title｜>T{EOS}",
            f"<｜User｜>q<｜Assistant｜><think>r</think>a{EOS}<｜title｜>T{EOS}",
        ),
        ([ROUTE, USER], "<｜User｜>q<｜User｜>q<｜Assistant｜></think>", "<｜User｜>q<｜User｜>q<｜Assistant｜><think>"),
        ([USER, USER | {"task": "query"}], "<｜User｜>q\n\nq<｜query｜>", "<｜User｜>q\n\nq<｜query｜>"),
        (
            [{"role": "developer", "content": "d", "task": "domain", "response_format": {}}],
            "<｜User｜>d<｜domain｜>",
            "<｜User｜>d<｜domain｜>",
        ),
    ],
    ids=["action", "action-answered", "action-then-answer", "title", "title-answered", "not-the-last", "joined", "developer"],
)
def test_tasks(messages, chat, thinking):
    assert encode_messages(messages, "chat") == BOS + chat
    assert encode_messages(messages, "thinking") == BOS + thinking


@pytest.mark.parametrize("task", ["query", "authority", "domain", "read_url", "title"])
def test_other_tasks_follow_the_text_at_once(task):
    user = {"role": "user", "content": "see<｜extracted_url｜>http://x", "task": task}
    for mode in ("chat", "thinking"):
        prompt = f"{BOS}<｜User｜>see<｜extracted_url｜>http://x<｜{task}｜>"
        assert encode_messages([user], mode) == prompt
        assert encode_messages([user, {"role": "assistant", "reasoning_content": "no", "content": "A"}], mode) == f"{prompt}A{EOS}"


def test_an_assistant_turn_may_be_left_open():
    text = encode_messages([USER, ANSWER | {"wo_eos": True}], "thinking")
    assert text == f"{BOS}<｜User｜>q<｜Assistant｜><think>r</think>a"
    assert encode_messages([USER, ANSWER | {"wo_eos": False}], "thinking") == text + EOS


# Going on after a turn


def test_continuation_is_what_follows_the_turn():
    messages = [USER, ANSWER, {"role": "tool", "content": "1"}, USER]
    whole = encode_messages(messages, "thinking", drop_thinking=False)
    assert encode_messages(messages[:2], "thinking") + continuation(messages[:2], messages[2:], "thinking") == whole


@pytest.mark.parametrize("new", [[], [{"role": "assistant", "content": "x"}]], ids=["none", "assistant"])
def test_continuation_needs_a_turn_to_answer(new):
    with pytest.raises(EncodingError):
        continuation([USER], new, "thinking")
