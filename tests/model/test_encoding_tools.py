"""The encoding of tools: the block that offers them, calls to them, and their results."""

import json
from pathlib import Path

import pytest

from model.encoding import BOS, EOS, encode_messages

GOLDEN = (Path(__file__).parents[1] / "data" / "encoding" / "output_1.txt").read_text()
SYSTEM = {"role": "system", "content": "S"}
USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "reasoning_content": "r", "content": "a"}
WEATHER = {
    "name": "weather",
    "description": "Wetter für Orte",
    "parameters": {"properties": {"city": {"type": "string"}}},
}
CLOCK = {"name": "clock", "parameters": {}}


def call(name, arguments, id=None):
    made = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return made | ({"id": id} if id else {})


def parameter(name, flag, text):
    return f'<｜DSML｜parameter name="{name}" string="{flag}">{text}</｜DSML｜parameter>\n'


def block(*invokes):
    lines = "".join(f'<｜DSML｜invoke name="{name}">\n{"".join(parameters) or chr(10)}</｜DSML｜invoke>\n' for name, *parameters in invokes)
    return f"\n\n<｜DSML｜tool_calls>\n{lines}</｜DSML｜tool_calls>"


def test_tools_block_lists_a_schema_a_line_and_is_followed_by_the_response_format():
    head = GOLDEN[GOLDEN.index("## Tools") : GOLDEN.index('{"name": "get_weather"')]
    message = {
        "role": "system",
        "tools": [{"type": "function", "function": WEATHER}, CLOCK],
        "response_format": {"type": "object", "é": [1]},
    }
    attachments = (
        f"\n\n{head}"
        '{"name": "weather", "description": "Wetter für Orte", "parameters": {"properties": {"city": {"type": "string"}}}}\n'
        '{"name": "clock", "parameters": {}}\n\n'
        "You MUST strictly follow the above defined tool name and parameter schemas to invoke tool calls.\n\n\n"
        "## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"
        '{"type": "object", "é": [1]}'
    )
    assert encode_messages([message], "chat") == BOS + attachments
    assert encode_messages([message | {"content": "S"}, USER], "chat") == f"{BOS}S{attachments}<｜User｜>q<｜Assistant｜></think>"
    developer = message | {"role": "developer", "content": "D"}
    assert encode_messages([SYSTEM, developer], "thinking") == f"{BOS}S<｜User｜>D{attachments}<｜Assistant｜><think>"


ARGUMENTS = {
    "text": 'Grüße, "quoted"\n<b>&amp;</b>',
    "digits": "5",
    "count": 5,
    "ratio": 0.5,
    "flag": True,
    "none": None,
    "list": [1, "zwölf", [None]],
    "object": {"é": {"a": [{}]}},
    "": "",
}


@pytest.mark.parametrize(
    "give", [json.dumps, lambda a: json.dumps(a, ensure_ascii=False, indent=2), dict], ids=["ascii", "indented", "dict"]
)
@pytest.mark.parametrize("bare", [False, True], ids=["function", "bare"])
def test_arguments_by_type(give, bare):
    made = call("f", give(ARGUMENTS))
    expected = block(
        (
            "f",
            parameter("text", "true", 'Grüße, "quoted"\n<b>&amp;</b>'),
            parameter("digits", "true", "5"),
            parameter("count", "false", "5"),
            parameter("ratio", "false", "0.5"),
            parameter("flag", "false", "true"),
            parameter("none", "false", "null"),
            parameter("list", "false", '[1, "zwölf", [null]]'),
            parameter("object", "false", '{"é": {"a": [{}]}}'),
            parameter("", "true", ""),
        )
    )
    message = {"role": "assistant", "content": None, "tool_calls": [made["function"] if bare else made]}
    assert encode_messages([message], "chat", context=[USER]) == expected + EOS


def test_calls_follow_the_content_and_each_other():
    calls = [call("clock", "{}"), call("weather", {"city": "Ulm"})]
    text = encode_messages([ANSWER | {"tool_calls": calls}], "thinking", context=[USER])
    assert text == "r</think>a" + block(("clock",), ("weather", parameter("city", "true", "Ulm"))) + EOS
    assert 'name="clock">\n\n</｜DSML｜invoke>' in text
    assert encode_messages([ANSWER | {"tool_calls": []}], "thinking", context=[USER]) == f"r</think>a{EOS}"


CALLS = ANSWER | {"tool_calls": [call("clock", "{}", "a"), call("clock", "{}", "b"), call("clock", "{}", "c")]}


def told(text):
    return f"<tool_result>{text}</tool_result>"


def result(id, content):
    return {"role": "tool", "tool_call_id": id, "content": content}


B_THEN_A = [result("b", "2"), result("a", "1")]
PARTS = [{"type": "text", "text": "x"}, {"type": "image"}, {"type": "text", "text": "y"}]
INNER_IDS = [{"function": {"id": id, "name": "clock", "arguments": "{}"}} for id in "ab"]


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([CALLS, result("c", "3"), result("a", "1"), result("b", "2")], [told(1), told(2), told(3)]),
        ([CALLS, B_THEN_A[0], USER, B_THEN_A[1], USER], [told(1), "q", told(2), "q"]),
        ([CALLS, USER, *B_THEN_A], ["q", told(1), told(2)]),
        ([CALLS, B_THEN_A[0], result("?", "x"), B_THEN_A[1]], [told("x"), told(1), told(2)]),
        ([CALLS, {"role": "tool", "content": "x"}, {"role": "tool", "content": "y"}], [told("x"), told("y")]),
        ([ANSWER | {"tool_calls": [call("f", "{}"), call("f", "{}")]}, *B_THEN_A], [told(2), told(1)]),
        ([CALLS, USER, ANSWER, *B_THEN_A], [told(1), told(2)]),
        ([CALLS, ANSWER | {"tool_calls": [call("f", "{}")]}, *B_THEN_A], [told(2), told(1)]),
        ([ANSWER | {"tool_calls": INNER_IDS}, *B_THEN_A], [told(1), told(2)]),
        ([CALLS, result("a", PARTS)], [told("x\n\n[Unsupported image]\n\ny")]),
        ([CALLS, result("a", ""), result("b", None)], [told(""), told("")]),
        ([CALLS, result("a", '{"ä": 1}\n')], [told('{"ä": 1}\n')]),
    ],
    ids=[
        "sorted",
        "text-keeps-its-place",
        "text-first",
        "unknown-id",
        "no-ids",
        "calls-without-ids",
        "older-calls",
        "newest-calls",
        "inner-ids",
        "parts",
        "empty",
        "as-it-is",
    ],
)
def test_results_join_a_user_turn_in_the_order_of_the_calls(messages, expected):
    so_far = max(index for index, message in enumerate([USER, *messages]) if message["role"] == "assistant") + 1
    turn = "<｜User｜>" + "\n\n".join(expected) + "<｜Assistant｜><think>"
    assert encode_messages([USER, *messages], "thinking").endswith(EOS + turn)
    assert encode_messages([USER, *messages][so_far:], "thinking", context=[USER, *messages][:so_far]) == turn


def test_a_task_is_asked_of_a_turn_with_results():
    messages = [USER, CALLS, *B_THEN_A, USER | {"task": "query"}]
    assert encode_messages(messages, "thinking").endswith(f"<｜User｜>{told(1)}\n\n{told(2)}\n\nq<｜query｜>")


def test_a_developer_turn_does_not_join_results():
    messages = [USER, CALLS, result("a", "1"), {"role": "developer", "content": "D"}]
    assert encode_messages(messages, "thinking").endswith(f"<｜User｜>{told(1)}<｜User｜>D<｜Assistant｜><think>")
