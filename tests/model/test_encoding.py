"""The chat encoding against the release's pairs, and parsing against rendering."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.encoding import BOS, EOS, SPECIAL_TOKENS, EncodingError, boilerplate, continuation, encode_messages, parse_message

PAIRS = Path(__file__).parents[1] / "data" / "encoding"
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}


def call(name, arguments, id=None):
    made = {"type": "function", "function": {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}}
    return made | ({"id": id} if id else {})


@pytest.mark.parametrize("number", [1, 2])
def test_golden_pair(number):
    data = json.loads((PAIRS / f"input_{number}.json").read_text())
    messages = data if isinstance(data, list) else data["messages"]
    if isinstance(data, dict):
        messages[0]["tools"] = data["tools"]
    assert encode_messages(messages, "thinking") == (PAIRS / f"output_{number}.txt").read_text()


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("cut", range(1, 5))
def test_context_and_rest_join_to_the_whole(number, cut):
    data = json.loads((PAIRS / f"input_{number}.json").read_text())
    messages = data if isinstance(data, list) else data["messages"]
    whole = encode_messages(messages, "thinking", drop_thinking=False)
    head = encode_messages(messages[:cut], "thinking", drop_thinking=False)
    tail = encode_messages(messages[cut:], "thinking", context=messages[:cut], drop_thinking=False)
    assert head + tail == whole


def test_chat_mode_closes_the_thinking_at_once():
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "hi"}, {"role": "assistant", "content": "Hello"}]
    assert encode_messages(messages, "chat") == f"{BOS}S<｜User｜>hi<｜Assistant｜></think>Hello{EOS}"
    assert encode_messages(messages[:2], "chat", add_default_bos_token=False) == "S<｜User｜>hi<｜Assistant｜></think>"


def test_tool_results_are_merged_and_follow_the_order_of_the_calls():
    messages = [
        {"role": "system", "content": "", "tools": [WEATHER]},
        {"role": "user", "content": "q"},
        {"role": "assistant", "reasoning_content": "r", "tool_calls": [call("weather", {}, "a"), call("weather", {"n": 1}, "b")]},
        {"role": "tool", "tool_call_id": "b", "content": "second"},
        {"role": "tool", "tool_call_id": "a", "content": "first"},
        {"role": "user", "content": "and?"},
    ]
    text = encode_messages(messages, "thinking")
    expected = "<｜User｜><tool_result>first</tool_result>\n\n<tool_result>second</tool_result>\n\nand?<｜Assistant｜><think>"
    assert text.endswith(expected)
    assert continuation(messages[:3], messages[3:], "thinking") == expected


def test_developer_reminder_format_and_effort():
    messages = [
        {"role": "developer", "content": "old"},
        {"role": "latest_reminder", "content": "2026-01-01"},
        {"role": "developer", "content": "new", "response_format": {"type": "é"}},
    ]
    text = encode_messages(messages, "thinking", reasoning_effort="max")
    assert text.startswith(f"{BOS}Reasoning Effort: Absolute maximum with no shortcuts permitted.\n")
    assert text.endswith(
        "left unchecked.\n\n<｜latest_reminder｜>2026-01-01<｜User｜>new\n\n## Response Format:\n\n"
        'You MUST strictly adhere to the following schema to reply:\n{"type": "é"}<｜Assistant｜><think>'
    )
    assert "old" in encode_messages(messages, "thinking", drop_thinking=False)
    assert "Effort" not in encode_messages(messages, "chat", reasoning_effort="max")


def test_tasks():
    user = {"role": "user", "content": "q"}
    assert encode_messages([user | {"task": "action"}], "thinking") == f"{BOS}<｜User｜>q<｜Assistant｜><think><｜action｜>"
    assert encode_messages([user | {"task": "action"}], "chat") == f"{BOS}<｜User｜>q<｜Assistant｜></think><｜action｜>"
    assert (
        encode_messages([user | {"task": "query"}, {"role": "assistant", "content": "x"}], "thinking")
        == f"{BOS}<｜User｜>q<｜query｜>x{EOS}"
    )
    titled = [user, {"role": "assistant", "content": "a", "task": "title"}, {"role": "assistant", "content": "T"}]
    assert encode_messages(titled, "chat") == f"{BOS}<｜User｜>q<｜Assistant｜></think>a{EOS}<｜title｜>T{EOS}"


@pytest.mark.parametrize(
    "messages",
    [[{"role": "robot", "content": "x"}], [{"role": "developer"}], [{"role": "user", "content": "x", "task": "dance"}]],
    ids=["role", "developer", "task"],
)
def test_what_cannot_be_encoded_is_an_error(messages):
    with pytest.raises(EncodingError):
        encode_messages(messages, "thinking")


@pytest.mark.parametrize(
    "options", [{"thinking_mode": "loud"}, {"thinking_mode": "chat", "reasoning_effort": "low"}], ids=["mode", "effort"]
)
def test_unknown_options_are_errors(options):
    with pytest.raises(EncodingError):
        encode_messages([{"role": "user", "content": "x"}], **options)


def _plain(text):
    return not any(token in text for token in SPECIAL_TOKENS) and "｜" not in text


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40).filter(_plain)
names = st.text(st.characters(exclude_categories=["Cs"], exclude_characters='"\n'), min_size=1, max_size=12).filter(_plain)
values = st.recursive(
    texts | st.integers() | st.booleans() | st.none() | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
calls = st.builds(call, names, st.dictionaries(names, values, max_size=3))
turns = st.fixed_dictionaries(
    {"role": st.just("assistant"), "reasoning_content": texts, "content": texts, "tool_calls": st.lists(calls, max_size=3)}
)


@settings(max_examples=300, deadline=None)
@given(turns)
def test_parsing_undoes_rendering(turn):
    user = [{"role": "user", "content": "q"}]
    rendered = encode_messages([turn], "thinking", context=user)
    assert parse_message(rendered, "thinking") == turn
    chat = turn | {"reasoning_content": ""}
    assert parse_message(encode_messages([chat], "chat", context=user), "chat") == chat


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from([*SPECIAL_TOKENS, *boilerplate(), "x", '"', "\n", "1", ">"]), max_size=12).map("".join))
def test_junk_parses_or_raises_only_encoding_error(text):
    for mode in ("chat", "thinking"):
        try:
            message = parse_message(text + EOS, mode)
        except EncodingError:
            continue
        assert parse_message(encode_messages([message], mode, context=[{"role": "user", "content": "q"}]), mode) == message


BLOCK = (
    '\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="f">\n'
    '<｜DSML｜parameter name="a" string="false">1</｜DSML｜parameter>\n'
    "</｜DSML｜invoke>\n</｜DSML｜tool_calls>"
)


@pytest.mark.parametrize(
    "text",
    [
        "</think>no end",
        f"no thinking{EOS}",
        f"a</think>b</think>c{EOS}",
        f"a</think>b<think>{EOS}",
        f"{EOS}</think>{EOS}",
        f"</think>{BLOCK} more{EOS}",
        f"</think>{BLOCK.replace('>1<', '>one<')}{EOS}",
        f"</think>{BLOCK.replace('>1<', '>NaN<')}{EOS}",
        f"</think>{BLOCK.replace('>1<', '>' + '[' * 50_000 + '<')}{EOS}",
        f"</think>{BLOCK.replace('>1<', '>' + '9' * 9_000 + '<')}{EOS}",
        f"</think>{BLOCK.replace('</｜DSML｜invoke>', '')}{EOS}",
        f"</think>{BLOCK.replace('false', 'maybe')}{EOS}",
        f"</think>{BLOCK.replace('name=', 'nome=')}{EOS}",
        "</think>\n\n<｜DSML｜tool_calls>\n</｜DSML｜tool_calls>" + EOS,
        f"</think>{BLOCK.replace(chr(10) * 2, chr(10))}{EOS}",
    ],
    ids=lambda text: text[:40].encode("unicode_escape").decode(),
)
def test_malformed_turns(text):
    with pytest.raises(EncodingError):
        parse_message(text, "thinking")


def test_a_call_without_arguments():
    turn = {"role": "assistant", "reasoning_content": "", "content": "", "tool_calls": [call("stop", {})]}
    assert parse_message(encode_messages([turn], "thinking", context=[{"role": "user", "content": "q"}]), "thinking") == turn


@pytest.mark.parametrize("new", [[], [{"role": "assistant", "content": "x"}]], ids=["none", "assistant"])
def test_continuation_needs_a_turn_to_answer(new):
    with pytest.raises(EncodingError):
        continuation([{"role": "user", "content": "q"}], new, "thinking")
