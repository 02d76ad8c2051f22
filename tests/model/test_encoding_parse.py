"""Parsing a finished turn: it undoes rendering, and whatever else a model writes is an EncodingError and nothing worse."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.encoding import BOS, EOS, SPECIAL_TOKENS, EncodingError, boilerplate, continuation, encode_messages, parse_message
from runtime.generation.conversation import parse_turn

USER = {"role": "user", "content": "q"}
TOOL = {"role": "tool", "content": "1"}
DSML = "｜DSML｜"


def call(name, arguments):
    return {"type": "function", "function": {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}}


def turn(reasoning="", content="", calls=()):
    return {"role": "assistant", "reasoning_content": reasoning, "content": content, "tool_calls": list(calls)}


def render(message, mode):
    return encode_messages([message], mode, context=[USER])


@pytest.mark.parametrize(
    ("mode", "text", "message"),
    [
        ("thinking", "Simple.</think>2 + 2 = 4.", turn("Simple.", "2 + 2 = 4.")),
        ("thinking", "</think>", turn()),
        ("thinking", "\n</think>\n\n", turn("\n", "\n\n")),
        ("chat", "4", turn(content="4")),
        ("chat", "", turn()),
        ("chat", "a < b\n\n<tool_calls>", turn(content="a < b\n\n<tool_calls>")),
    ],
    ids=["both", "nothing", "blanks", "chat", "chat-nothing", "angles"],
)
def test_text(mode, text, message):
    assert parse_message(text + EOS, thinking_mode=mode) == message


def block(*parameters, name="f"):
    inside = "".join(f"<｜DSML｜parameter {parameter}</｜DSML｜parameter>\n" for parameter in parameters)
    return f'\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="{name}">\n{inside or chr(10)}</｜DSML｜invoke>\n</｜DSML｜tool_calls>'


def test_calls_by_type():
    written = block(
        'name="s" string="true">5', 'name="n" string="false">5', 'name="o" string="false">{"é":[1,null]}', 'name="t" string="true">'
    )
    message = parse_message(f"r</think>c{written}{EOS}", "thinking")
    assert message == turn(
        "r", "c", [{"type": "function", "function": {"name": "f", "arguments": '{"s": "5", "n": 5, "o": {"é": [1, null]}, "t": ""}'}}]
    )
    assert parse_message(f"c{written}{EOS}", "chat") == message | {"reasoning_content": ""}


@pytest.mark.parametrize("inside", ["\n", ""], ids=["as-rendered", "without-the-blank-line"])
def test_a_call_without_arguments(inside):
    text = block().replace('"f">\n\n', f'"f">\n{inside}')
    assert parse_message(text + EOS, "chat") == turn(calls=[call("f", {})])


ODD = [
    'a"b',
    "a\nb",
    "<b>&",
    '" string="maybe">',
    "</parameter>",
    "｜",
    "</think>",
    "<think>",
    EOS,
    BOS,
    "{}",
    "\r\n",
    "\x00",
    "\u2028",
    "name=",
]


@pytest.mark.parametrize("text", ODD, ids=ascii)
def test_arguments_hold_anything_but_their_own_markup(text):
    message = turn(calls=[call("f", {text: text, "n": [text, {text: text}]}), call(f"g{text}", {})])
    assert parse_message(render(message, "chat"), "chat") == message
    assert parse_message(render(message, "thinking"), "thinking") == message


# Properties

words = st.sampled_from(
    ["<", ">", '"', "\n", "\n\n", "</", DSML, "｜", "invoke", 'parameter name="', "tool_calls>", '" string="true">', '">\n', *ODD]
)
anything = st.text(st.characters(exclude_categories=["Cs"]), max_size=20) | st.lists(words, max_size=8).map("".join)
unmarked = anything.filter(lambda text: DSML not in text)
plain = anything.filter(lambda text: not any(token in text for token in SPECIAL_TOKENS))
names = unmarked.filter(lambda name: name and '">\n' not in name)
keys = unmarked.filter(lambda key: '" string="true">' not in key and '" string="false">' not in key)
leaves = unmarked | st.integers() | st.booleans() | st.none() | st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(unmarked, inner, max_size=3), max_leaves=6)
calls = st.builds(call, names, st.dictionaries(keys, values, max_size=3))
turns = st.builds(turn, plain, plain, st.lists(calls, max_size=3))


@settings(max_examples=300, deadline=None)
@given(turns)
def test_parsing_undoes_rendering(message):
    assert parse_message(render(message, "thinking"), "thinking") == message
    chat = message | {"reasoning_content": ""}
    assert parse_message(render(message, "chat"), "chat") == chat


@settings(max_examples=200, deadline=None)
@given(st.lists(st.builds(call, anything, st.dictionaries(anything, values | anything, max_size=3)), max_size=3))
def test_a_call_is_read_back_as_it_was_or_not_rendered(calls):
    try:
        text = render(turn(calls=calls), "chat")
    except EncodingError:
        return
    assert parse_message(text, "chat") == turn(calls=calls)


def settle(text):
    """Whatever a model wrote becomes a turn that a rollout can keep, store and go on from."""
    for mode in ("chat", "thinking"):
        kept = parse_turn(text, mode)
        json.dumps(kept, ensure_ascii=False).encode(errors="strict" if "error" not in kept else "surrogatepass")
        try:
            message = parse_message(text, mode)
        except EncodingError as error:
            assert kept == {"role": "assistant", "content": text, "error": str(error)}
            str(error).encode()
            continue
        assert kept == message
        assert parse_message(render(message, mode), mode) == message
        assert continuation([USER, message], [TOOL], mode)


pieces = [
    *SPECIAL_TOKENS,
    *boilerplate(),
    "x",
    '"',
    "\n",
    "1",
    ">",
    "[",
    "{",
    "}",
    '"\\ud800"',
    '"\\uff5cDSML\\uff5c"',
    "1e999",
    "NaN",
    '{"a":1,"a":1}',
]


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=60) | st.lists(st.sampled_from(pieces), max_size=14).map("".join))
def test_any_text_is_a_turn_or_an_error(text):
    settle(text)
    settle(text + EOS)


@settings(max_examples=300, deadline=None)
@given(st.data(), turns.filter(lambda message: message["tool_calls"]))
def test_damaged_renders_are_turns_or_errors(data, message):
    text = render(message, "thinking")
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, min(len(text), start + 30)))
    settle(text[:start] + data.draw(st.sampled_from(["", *pieces]) | st.characters()) + text[end:])


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(["true", "false"]), st.lists(st.sampled_from(pieces), max_size=5).map("".join))
def test_any_value_is_kept_or_refused(flag, value):
    settle(block(f'name="a" string="{flag}">{value}') + EOS)


# Malformed turns

ONE = block('name="a" string="false">1')
TWO = block('name="a" string="true">1', 'name="b" string="true">2')


@pytest.mark.parametrize(
    "text",
    [
        "</think>no end",
        f"no thinking{EOS}",
        f"a</think>b</think>c{EOS}",
        f"<think>a</think>b{EOS}",
        f"a</think>b<think>{EOS}",
        f"{EOS}</think>{EOS}",
        f"</think>a{EOS}b{EOS}",
        f"</think>a<｜User｜>b{EOS}",
        f"</think>a{EOS}\n",
        f"a{ONE}</think>b{EOS}",
        f"</think>{ONE} more{EOS}",
        f"</think>{ONE}{ONE}{EOS}",
        f"</think>{ONE.replace('>1<', '>one<')}{EOS}",
        f"</think>{ONE.replace('>1<', '><')}{EOS}",
        f"</think>{ONE.replace('>1<', '>NaN<')}{EOS}",
        f"</think>{ONE.replace('>1<', '>-Infinity<')}{EOS}",
        f"</think>{ONE.replace('>1<', '>1e999<')}{EOS}",
        f"</think>{ONE.replace('>1<', '>1 2<')}{EOS}",
        f"</think>{ONE.replace('>1<', '>' + '[' * 50_000 + '<')}{EOS}",
        f"</think>{ONE.replace('>1<', '>' + '[' * 129 + ']' * 129 + '<')}{EOS}",
        f"</think>{ONE.replace('>1<', '>' + '9' * 9_000 + '<')}{EOS}",
        f"</think>{ONE.replace('>1<', '>' + chr(34) + chr(92) + 'ud800' + chr(34) + '<')}{EOS}",
        f"</think>{ONE.replace('1</｜DSML｜parameter>', '1')}{EOS}",
        f"</think>{TWO.replace('1</｜DSML｜parameter>', '1')}{EOS}",
        f"</think>{TWO.replace('name=' + chr(34) + 'b', 'name=' + chr(34) + 'a')}{EOS}",
        f"</think>{TWO.replace('parameter>' + chr(10), 'parameter>')}{EOS}",
        f"</think>{ONE.replace('parameter>' + chr(10), 'parameter>' + chr(10) * 2)}{EOS}",
        f"</think>{ONE.replace('</｜DSML｜invoke>', '')}{EOS}",
        f"</think>{ONE.replace('</｜DSML｜tool_calls>', '')}{EOS}",
        f"</think>{ONE.replace('false', 'maybe')}{EOS}",
        f"</think>{ONE.replace(' string=' + chr(34) + 'false' + chr(34), '')}{EOS}",
        f"</think>{ONE.replace('name=', 'nome=')}{EOS}",
        f"</think>{block(name='')}{EOS}",
        f"</think>\n\n<｜DSML｜tool_calls>\n</｜DSML｜tool_calls>{EOS}",
        f"</think>{ONE.replace(chr(10) * 2, chr(10))}{EOS}",
        f"</think>{ONE.replace('<｜DSML｜tool_calls>', '<｜DSML｜tool_calls >')}{EOS}",
        f"\ud800</think>{EOS}",
        "",
    ],
    ids=lambda text: ascii(text[-140:-20][:60]),
)
def test_malformed_turns(text):
    with pytest.raises(EncodingError):
        parse_message(text, "thinking")


@pytest.mark.parametrize("value", ["[" * 128 + "]" * 128, "[" * 127 + '{"a": 1}' + "]" * 127], ids=["lists", "object"])
def test_the_deepest_argument_survives(value):
    message = parse_message(block(f'name="a" string="false">{value}') + EOS, "chat")
    assert parse_message(render(message, "chat"), "chat") == message
    as_mapping = {"name": "f", "arguments": {"a": json.loads(value)}}
    assert render(turn(calls=[as_mapping]), "chat") == render(message, "chat")


def test_a_long_turn_is_read_in_one_go():
    """Hundreds of thousands of characters of markup that never closes; anything worse than linear would not end."""
    for piece in ('">\n', f'<{DSML}parameter name="', f'<{DSML}invoke name="a">\n', f"</{DSML}parameter>", '" string="true">'):
        with pytest.raises(EncodingError):
            parse_message(block('name="a" string="true">' + piece * 100_000)[:-40] + EOS, "chat")
    message = turn(calls=[call("write", {"text": "line\n" * 100_000})])
    assert parse_message(render(message, "chat"), "chat") == message


def test_unknown_mode():
    with pytest.raises(EncodingError, match="thinking_mode: got 'loud'"):
        parse_message(EOS, "loud")
