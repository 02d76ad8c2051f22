"""The agent domain: errands replayed through the real sandboxed shop, errors in words, and verdicts on lazy and hostile agents."""

import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from domains import agent_server, agent_tasks
from domains.agent_tasks import TOOLS, AgentTasks
from domains.catalog import make_domain
from domains.config import DomainConfig, SandboxConfig
from domains.procedural import split_of
from domains.types import Prompt, Sample
from model.encoding import encode_messages, parse_message

DATABASE = {
    "customers": [[111, "Ada"], [222, "Ben"]],
    "products": [[333, "lamps", 5, 4]],
    "orders": [[444, 222, 333, 2]],
    "next_order_id": 555,
}
EXPECTED = {
    "customers": [[111, "Ada"], [222, "Ben"]],
    "products": [[333, "lamps", 5, 1]],
    "orders": [[444, 222, 333, 2], [555, 111, 333, 3]],
}
ORDER = Prompt("agent/train/0", "agent", [], {"database": DATABASE, "expected": EXPECTED, "facts": [555, 15]})


@pytest.fixture(scope="module")
def domain():
    made = make_domain("agent", DomainConfig(kind="agent"), SandboxConfig())
    yield made
    made.close()


@pytest.fixture(scope="module")
def environment(domain):
    made = domain.environment()
    yield made
    made.close()


def call(name, /, **arguments):
    return {"type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}


def said(content="", *calls, **extra):
    return {"role": "assistant", "reasoning_content": "", "content": content, "tool_calls": list(calls)} | extra


def play(environment, prompt, turns):
    """Run assistant turns through the environment and return the finished sample."""
    (handle,) = environment.open([prompt])
    messages = []
    for turn in turns:
        (reply,) = environment.respond([(handle, turn)])
        messages += [turn, *reply]
        if not reply:
            break
    return Sample(prompt, [], [], [], messages=messages, outcome=environment.finish([handle])[0])


def replay(environment, demonstration):
    """Encode and parse each assistant turn as a rollout does, then play it."""
    so_far, turns = list(demonstration.prompt.messages), []
    for message in demonstration.messages:
        if message["role"] == "assistant":
            turns.append(parse_message(encode_messages([message], "thinking", context=so_far), "thinking"))
        so_far.append(message)
    return play(environment, demonstration.prompt, turns)


@pytest.mark.parametrize("difficulty", [1, 2, 3])
def test_careful_demonstrations_earn_1_and_their_tool_turns_are_the_real_ones(domain, environment, difficulty):
    demonstrations = AgentTasks("agent", difficulty=difficulty, diligence=1.0).demonstrations(60, seed=3)
    samples = [replay(environment, d) for d in demonstrations]
    assert [s.messages for s in samples] == [d.messages for d in demonstrations]
    assert {(v.reward, v.status) for v in domain.grade(samples)} == {(1.0, "ok")}


def test_hasty_demonstrations_often_fail(domain, environment):
    demonstrations = AgentTasks("agent", difficulty=1, diligence=0.0).demonstrations(100, seed=3)
    samples = [replay(environment, d) for d in demonstrations]
    assert 0.2 < sum(v.reward for v in domain.grade(samples)) / 100 < 0.55
    assert {v.status for v in domain.grade(samples)} == {"ok", "wrong"}


def test_splits_are_disjoint(domain):
    train = {json.dumps(p.truth) for p in domain.prompts("train", 2000, seed=0)}
    heldout = {json.dumps(p.truth) for p in domain.prompts("heldout", 2000, seed=0)}
    assert len(train) == len(heldout) == 2000
    assert not train & heldout
    assert domain.prompts("heldout", 20, seed=0) == domain.prompts("heldout", 40, seed=0)[:20]
    facts = Counter(str(p.truth["facts"]) for p in domain.prompts("heldout", 2000, seed=0))
    assert facts.most_common(1)[0][1] < 100  # no constant answer is right more often than one time in twenty


def test_doing_nothing_never_pays(domain, environment):
    for prompt in domain.prompts("train", 60, seed=1):
        for content in ("", "Done.", f"{prompt.messages[-1]['content']} 0 1 2 3"):
            assert domain.grade([play(environment, prompt, [said(content)])])[0].reward == 0


RIGHT = [said("", call("place_order", customer_id=111, product_id=333, quantity=3)), said("Order 555, total 15.")]


def test_the_right_errand(domain, environment):
    assert domain.grade([play(environment, ORDER, RIGHT)])[0].reward == 1


@pytest.mark.parametrize(
    "turns",
    [
        [said("Order 555, total 15.")],
        [RIGHT[0]],
        [RIGHT[0], said("Order 555.")],
        [RIGHT[0], said("Order 555, total 15, or 16.")],
        [RIGHT[0], said(" ".join(map(str, range(600))))],
        [RIGHT[0], said("Order 5551, total 15.")],
        [RIGHT[0], RIGHT[0], RIGHT[1]],
        [said("", call("place_order", customer_id=222, product_id=333, quantity=3)), RIGHT[1]],
        [RIGHT[0], said("", call("cancel_order", order_id=444)), RIGHT[1]],
        [RIGHT[0], said("Order 555, total 15.", error="no end")],
        [RIGHT[0], said(None)],
        [RIGHT[0], said("x" * 10**6)],
        [],
    ],
    ids=["lies", "silent", "half", "extra", "spraying", "near", "twice", "other", "more", "broken", "none", "huge", "empty"],
)
def test_wrong_errands(domain, environment, turns):
    found = domain.grade([play(environment, ORDER, turns)])[0]
    assert found.reward == 0
    assert found.status in ("wrong", "unparsable")


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (call("fly"), "unknown tool, there are find_customer, find_product"),
        (call("find_customer"), "find_customer needs name"),
        (call("find_customer", name=3), "name must be a short text"),
        (call("find_customer", name="\ud800"), "name must be a short text"),
        (call("find_customer", name="x" * 99), "name must be a short text"),
        (call("find_customer", name="Zoe"), "no customer is named Zoe"),
        (call("find_customer", name="Ada' OR 1=1 --"), "no customer is named Ada' OR 1=1 --"),
        (call("find_customer", name="Ada", id=3), "find_customer takes only name"),
        (call("place_order", customer_id=111, product_id=333, quantity=True), "quantity must be an integer"),
        (call("place_order", customer_id=111, product_id=333, quantity=1.0), "quantity must be an integer"),
        (call("place_order", customer_id=111, product_id=333, quantity=-1), "quantity must be at least 1"),
        (call("place_order", customer_id=111, product_id=333, quantity=10**30), "quantity must be an integer"),
        (call("place_order", customer_id=999, product_id=333, quantity=1), "no customer has the id 999"),
        (call("place_order", customer_id=111, product_id=999, quantity=1), "no product has the id 999"),
        (call("cancel_order", order_id=1), "no order has the id 1"),
        (call("dump"), "unknown tool"),
        (call("__init__", database={}), "unknown tool"),
    ],
    ids=lambda value: value if isinstance(value, str) else value["function"]["name"],
)
def test_wrong_calls_are_answered_in_words(environment, made, words):
    (handle,) = environment.open([ORDER])
    (reply,) = environment.respond([(handle, said("", made))])
    assert [turn["role"] for turn in reply] == ["tool"]
    assert reply[0]["content"].startswith(f"error: {words}")
    tables = {name: DATABASE[name] for name in ("customers", "products", "orders")}
    assert environment.finish([handle]) == [{"database": tables}]


def test_too_many_or_too_long_calls(environment):
    (handle,) = environment.open([ORDER])
    for turn in (said("", *[call("find_customer", name="Ada")] * 50), said("", call("find_customer", name="x" * 10**5))):
        (reply,) = environment.respond([(handle, turn)])
        assert reply == [{"role": "tool", "content": "error: at most 4 short calls at once"}]
    environment.finish([handle])


def test_episodes_do_not_see_each_other_and_ids_are_answered(environment):
    first, second = environment.open([ORDER, ORDER])
    order = call("place_order", customer_id=111, product_id=333, quantity=3) | {"id": "a"}
    replies = environment.respond([(second, said("", order)), (first, said("", call("find_product", name="lamps"))), (first, said("Bye."))])
    assert replies == [
        [{"role": "tool", "content": '{"order_id": 555, "total": 15}', "tool_call_id": "a"}],
        [{"role": "tool", "content": '{"product_id": 333, "price": 5, "stock": 4}'}],
        [],
    ]
    outcomes = environment.finish([first, second])
    assert outcomes[0]["database"]["orders"] == DATABASE["orders"]
    assert outcomes[1]["database"] == EXPECTED


def test_cancelling_returns_the_goods(environment):
    sample = play(environment, ORDER, [said("", call("cancel_order", order_id=444)), said("Bye.")])
    assert sample.messages[1]["content"] == '{"refund": 10}'
    assert sample.outcome["database"]["orders"] == []
    assert sample.outcome["database"]["products"] == [[333, "lamps", 5, 6]]


def test_a_lost_process_is_infrastructure_and_the_next_episode_works(domain):
    environment = domain.environment()
    (handle,) = environment.open([ORDER])
    environment._session.close()
    assert environment.respond([(handle, RIGHT[0])]) == [[]]
    sample = Sample(ORDER, [], [], [], messages=[RIGHT[0]], outcome=environment.finish([handle])[0])
    assert domain.grade([sample])[0].status == "infrastructure"
    assert domain.grade([play(environment, ORDER, RIGHT)])[0].reward == 1
    environment.close()
    environment.close()


def test_expectations_never_enter_the_sandbox(domain):
    environment = domain.environment()
    sent = []
    environment.open([ORDER])
    real = environment._session.call
    environment._session.call = lambda request, timeout_s: sent.append(request) or real(request, timeout_s)
    play(environment, ORDER, RIGHT)
    environment.close()
    assert "open" in sent[0]
    assert not any(word in json.dumps(sent) for word in ("expected", "facts", "[555, 111"))


def test_the_schemas_are_the_tools():
    schemas = {t["function"]["name"]: t["function"]["parameters"]["properties"] for t in TOOLS}
    kinds = {str: "string", int: "integer"}
    assert schemas == {name: {key: {"type": kinds[kind]} for key, kind in keys.items()} for name, keys in agent_server.TOOLS.items()}


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=50),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from([*agent_server.TOOLS, "x", ""]),
    st.dictionaries(st.sampled_from(["name", "order_id", "customer_id", "product_id", "quantity", "x"]), anything),
)
def test_no_call_breaks_the_server(name, arguments):
    text = agent_server.call(agent_server.Shop(DATABASE), name, arguments)
    assert text.startswith("error: ") or json.loads(text)
    text.encode()


def test_documents_have_nothing_of_a_chat(domain):
    documents = domain.documents(1000, seed=0)
    assert documents[:10] == domain.documents(10, seed=0)
    assert not any("DSML" in text or "<" in text for text in documents)


def test_documents_are_about_training_errands_only(domain, monkeypatch):
    written, log = [], agent_tasks._log
    monkeypatch.setattr(agent_tasks, "_log", lambda errand: written.append(errand.key) or log(errand))
    domain.documents(200, seed=0)
    assert len(written) == 400 and {split_of(key) for key in written} == {"train"}
