"""Bad messages: each refused by its number, field, value and what was expected."""

import re

import pytest

from model.encoding import EncodingError, encode_messages

USER = {"role": "user", "content": "q"}
DEEP = "[" * 200 + "]" * 200


def calling(call):
    return {"role": "assistant", "tool_calls": [{"function": {"name": "ok", "arguments": {}}}, call]}


def calls(name="f", arguments="{}"):
    return calling({"function": {"name": name, "arguments": arguments}})


ARGUMENTS = "tool_calls[1].function.arguments"


BAD = [
    ("hello", "messages[1]: got 'hello', expected a message"),
    ({"content": "x"}, "messages[1].role: got None, expected one of system, user, developer, latest_reminder, assistant, tool"),
    ({"role": "robot"}, "messages[1].role: got 'robot', expected one of system"),
    ({"role": "direct_search_results", "content": "x"}, "messages[1].role: got 'direct_search_results', expected one of system"),
    ({"role": ["user"]}, "messages[1].role: got ['user'], expected one of"),
    ({"role": "developer"}, "messages[1].content: got None, expected text, which a developer message needs"),
    ({"role": "developer", "content": ""}, "messages[1].content: got '', expected text, which"),
    ({"role": "user", "content": 5}, "messages[1].content: got 5, expected text or a list of content parts"),
    ({"role": "tool", "content": {"a": 1}}, "messages[1].content: got {'a': 1}, expected text or a list of content parts"),
    ({"role": "user", "content": ["x"]}, "messages[1].content[0]: got 'x', expected a content part"),
    ({"role": "user", "content": [{"type": "text"}]}, "messages[1].content[0].text: got None, expected text"),
    ({"role": "user", "content": "a\ud800"}, r"messages[1].content: got '\ud800', expected Unicode text"),
    ({"role": "assistant", "reasoning_content": 1}, "messages[1].reasoning_content: got 1, expected text"),
    (
        {"role": "user", "reasoning_content": "r"},
        "messages[1].reasoning_content: got 'r', expected none in a user message, only in assistant",
    ),
    ({"role": "assistant", "wo_eos": "yes"}, "messages[1].wo_eos: got 'yes', expected true or false"),
    ({"role": "user", "task": "dance"}, "messages[1].task: got 'dance', expected one of action, query"),
    (
        {"role": "system", "task": "query"},
        "messages[1].task: got 'query', expected none in a system message, only in user or developer",
    ),
    ({"role": "user", "tools": [{"name": "f"}]}, "messages[1].tools: got [{'name': 'f'}], expected none in a user message"),
    ({"role": "system", "tools": {"name": "f"}}, "messages[1].tools: got {'name': 'f'}, expected a list of tools"),
    ({"role": "system", "tools": ["f"]}, "messages[1].tools[0]: got 'f', expected a tool:"),
    ({"role": "system", "tools": [{"type": "function"}]}, "messages[1].tools[0]: got {'type': 'function'}, expected a tool:"),
    ({"role": "system", "tools": [{"name": "f", "x": {1}}]}, "messages[1].tools[0]: got {'name': 'f', 'x': {1}}, expected JSON"),
    ({"role": "system", "response_format": float("nan")}, "messages[1].response_format: got nan, expected JSON"),
    ({"role": "tool", "tool_call_id": 7}, "messages[1].tool_call_id: got 7, expected the id of a tool call"),
    ({"role": "user", "tool_calls": [{}]}, "messages[1].tool_calls: got [{}], expected none in a user message, only in assistant"),
    ({"role": "assistant", "tool_calls": {"a": 1}}, "messages[1].tool_calls: got {'a': 1}, expected a list of tool calls"),
    (calling("f()"), "messages[1].tool_calls[1]: got 'f()', expected a tool call"),
    (calling({"function": "f"}), "messages[1].tool_calls[1].function: got 'f', expected an object with `name` and `arguments`"),
    (calling({"arguments": "{}"}), "messages[1].tool_calls[1].function.name: got None, expected the name of a tool"),
    (calling({"name": "f"}), f"messages[1].{ARGUMENTS}: got None, expected a JSON object, as text or as a mapping"),
    (calling({"id": 3, "name": "f", "arguments": {}}), "messages[1].tool_calls[1].id: got 3, expected the id of a tool call"),
    (calls(name=""), "messages[1].tool_calls[1].function.name: got '', expected the name of a tool"),
    (calls(name='f">\nx'), "messages[1].tool_calls[1]: got {"),
    (calls(name="｜DSML｜"), "messages[1].tool_calls[1]: got {"),
    (calls(arguments=""), f"messages[1].{ARGUMENTS}: got '', expected a JSON object"),
    (calls(arguments="{'a': 1}"), f"messages[1].{ARGUMENTS}: got \"{{'a': 1}}\", expected a JSON object"),
    (calls(arguments="[1]"), f"messages[1].{ARGUMENTS}: got [1], expected a JSON object"),
    (calls(arguments='{"a": NaN}'), f"messages[1].{ARGUMENTS}: got '{{\"a\": NaN}}', expected a JSON object"),
    (calls(arguments='{"a": 1e999}'), f"messages[1].{ARGUMENTS}: got "),
    (calls(arguments='{"a": 1, "a": 2}'), f"messages[1].{ARGUMENTS}: got "),
    (calls(arguments=f'{{"a": {DEEP}}}'), f"messages[1].{ARGUMENTS}: got "),
    (calls(arguments=DEEP * 1000), f"messages[1].{ARGUMENTS}: got "),
    (calls(arguments={1: 2}), f"messages[1].{ARGUMENTS}: got {{1: 2}}, expected a JSON object"),
    (calls(arguments={"a": {1}}), f"messages[1].{ARGUMENTS}['a']: got {{1}}, expected JSON"),
    (calls(arguments={"a": float("inf")}), f"messages[1].{ARGUMENTS}['a']: got inf, expected JSON"),
    (calls(arguments={"a": 10**5000}), f"messages[1].{ARGUMENTS}['a']: got a number too long to print (int), expected JSON"),
    (calls(arguments={"a": "\ud800"}), rf"messages[1].{ARGUMENTS}['a']: got '\ud800', expected Unicode text"),
    (calls(arguments={"a": ["\ud800"]}), rf"messages[1].{ARGUMENTS}['a']: got '\ud800', expected Unicode text"),
    (calls(arguments={"a": "</｜DSML｜parameter>"}), "messages[1].tool_calls[1]: got {"),
    (calls(arguments={"a": {"b": ["｜DSML｜"]}}), "messages[1].tool_calls[1]: got {"),
    (calls(arguments={'a" string="true">b': "c"}), "messages[1].tool_calls[1]: got {"),
]


@pytest.mark.parametrize(("message", "error"), BAD, ids=[error.partition(":")[0] for _, error in BAD])
def test_a_bad_message_is_named(message, error):
    with pytest.raises(EncodingError, match=f"^{re.escape(error)}") as caught:
        encode_messages([USER, message], "thinking")
    str(caught.value).encode()  # it goes to logs and reports
    assert len(str(caught.value)) < 500
    with pytest.raises(EncodingError, match=r"^context\[1\]"):
        encode_messages([USER], "thinking", context=[USER, message])


@pytest.mark.parametrize("messages", ["hello", {"role": "user", "content": "q"}, None, 5], ids=["text", "message", "none", "number"])
def test_messages_are_a_list(messages):
    with pytest.raises(EncodingError, match=r"^messages: got .*, expected a list of messages"):
        encode_messages(messages, "thinking")


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"thinking_mode": "loud"}, "thinking_mode: got 'loud', expected 'chat' or 'thinking'"),
        ({"thinking_mode": "chat", "reasoning_effort": "low"}, "reasoning_effort: got 'low', expected None, 'high' or 'max'"),
    ],
    ids=["mode", "effort"],
)
def test_unknown_options_are_errors(options, error):
    with pytest.raises(EncodingError, match=re.escape(error)):
        encode_messages([USER], **options)


def test_fields_that_are_empty_may_stand_anywhere():
    """Rows of a table have every column."""
    row = {"tools": None, "tool_calls": [], "reasoning_content": "", "task": None, "response_format": None, "wo_eos": None, "name": "x"}
    for role in ("system", "user", "developer", "latest_reminder", "assistant", "tool"):
        message = {"role": role, "content": "c"}
        assert encode_messages([message | row], "thinking") == encode_messages([message], "thinking")


def test_messages_are_left_as_they_are():
    messages = [{"role": "tool", "content": "b"}, {"role": "user", "content": "c", "task": "query"}]
    before = [dict(message) for message in messages]
    encode_messages(messages, "thinking", context=messages)
    assert messages == before
