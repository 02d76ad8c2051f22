"""The code domain: tasks whose edge clause is tested, and verdicts on right, careless and hostile programs run in the real sandbox."""

import pytest

from domains.catalog import make_domain
from domains.code_tasks import CodeTasks
from domains.config import DomainConfig, SandboxConfig
from domains.sandbox.cases import CaseOutput, CaseResults
from domains.types import Prompt, Sample

LIMITS = SandboxConfig(timeout_s=2.0, memory_mib=128)


@pytest.fixture(scope="module")
def domain():
    made = make_domain("code", DomainConfig(kind="code"), LIMITS)
    yield made
    made.close()


def turn(content, **extra):
    return {"role": "assistant", "reasoning_content": "r", "content": content, "tool_calls": []} | extra


def block(program):
    return f"```python\n{program}\n```"


def sample(prompt, *messages, truncated=False):
    return Sample(prompt, [], [], [], messages=list(messages), truncated=truncated)


DOUBLE = Prompt(
    "code/train/0", "code", [], {"function": "f", "cases": [{"input": [[]], "expected": []}, {"input": [[1, 2]], "expected": [2, 4]}]}
)
ONE = Prompt("code/train/1", "code", [], {"function": "f", "cases": [{"input": [[]], "expected": 1}, {"input": [[2]], "expected": 1}]})
RIGHT = "def f(xs):\n    return [2 * x for x in xs]"


def verdict(domain, content, prompt=DOUBLE):
    return domain.grade([sample(prompt, turn(content))])[0]


def test_splits_are_disjoint(domain):
    train = {p.messages[0]["content"] for p in domain.prompts("train", 1500, seed=0)}
    heldout = {p.messages[0]["content"] for p in domain.prompts("heldout", 1500, seed=0)}
    assert len(train) == len(heldout) == 1500
    assert not train & heldout
    assert domain.prompts("train", 20, seed=0) == domain.prompts("train", 40, seed=0)[:20]


@pytest.mark.parametrize("difficulty", [1, 2, 3])
def test_every_task_is_solved_by_care_and_by_nothing_less(difficulty):
    careful = CodeTasks("code", difficulty=difficulty, diligence=1.0).demonstrations(150, seed=1)
    hasty = CodeTasks("code", difficulty=difficulty, diligence=0.0).demonstrations(150, seed=1)
    for demonstrations, solved in ((careful, True), (hasty, False)):
        for demonstration in demonstrations:
            names = {}
            exec(demonstration.messages[0]["content"].split("```python\n")[1].split("```")[0], names)
            wrong = 0
            for case in demonstration.prompt.truth["cases"]:
                try:
                    wrong += names["f"](*case["input"]) != case["expected"]
                except (ValueError, IndexError):
                    wrong += 1
            assert wrong == 0 if solved else wrong >= 2


def test_demonstrations_in_the_sandbox(domain):
    demonstrations = domain.demonstrations(24, seed=0)
    assert [d.prompt for d in demonstrations] == domain.prompts("train", 24, seed=0)
    verdicts = domain.grade([sample(d.prompt, *d.messages) for d in demonstrations])
    careful = [d.messages[0]["reasoning_content"].startswith("Check") for d in demonstrations]
    assert [v.reward for v in verdicts] == [float(c) for c in careful]
    assert {v.status for v, c in zip(verdicts, careful) if c} == {"ok"}
    assert 4 < sum(careful) < 20


def test_documents_hold_no_heldout_specification_and_nothing_of_a_chat(domain):
    documents = domain.documents(3000, seed=0)
    assert documents[:20] == domain.documents(20, seed=0)
    text = "\n".join(documents)
    assert "```" not in text and "Check" not in text
    assert not any(p.messages[0]["content"] in text for p in domain.prompts("heldout", 1000, seed=0))
    assert any(p.messages[0]["content"] in text for p in domain.prompts("train", 1000, seed=0))


def test_a_right_program(domain):
    found = verdict(domain, f"Here:\n{block(RIGHT)}\nDone.")
    assert (found.reward, found.status) == (1.0, "ok")


@pytest.mark.parametrize(
    ("program", "prompt"),
    [
        ("def f(xs):\n    return xs", DOUBLE),
        ("def f(xs):\n    return None", DOUBLE),
        ("def f():\n    return []", DOUBLE),
        ("def f(xs):\n    raise KeyError", DOUBLE),
        ("def f(xs):\n    return True", ONE),
        ("def f(xs):\n    return 1.0", ONE),
        ("def f(xs):\n    return '1'", ONE),
        ("class E(int):\n    def __eq__(s, o): return True\ndef f(xs):\n    return E(1)", ONE),
        ("class E:\n    def __eq__(s, o): return True\ndef f(xs):\n    return E()", ONE),
        ("def f(xs):\n    print('[[1, 1]]')", ONE),
        ("import sys\ndef f(xs):\n    sys.exit(0)", ONE),
        ("import os\nos._exit(0)\ndef f(xs):\n    return 1", ONE),
        ("def f(xs):\n    return open('/etc/shadow').read()", ONE),
    ],
    ids=lambda value: value.splitlines()[-1].strip()[:30] if isinstance(value, str) else "",
)
def test_wrong_and_hostile_programs(domain, program, prompt):
    found = verdict(domain, block(program), prompt)
    assert found.reward == 0
    assert found.status in ("wrong", "crash")


@pytest.mark.parametrize(
    ("program", "status"),
    [
        ("def f(xs):\n    while True: pass", "timeout"),
        ("def f(xs):\n    return 'x' * (1 << 40)", None),
        ("x = 'y' * (1 << 34)\ndef f(xs): return x", None),
    ],
    ids=["loop", "memory in a call", "memory at import"],
)
def test_limits(domain, program, status):
    found = verdict(domain, block(program))
    assert found.reward == 0
    assert found.status == status if status else found.status in ("memory", "wrong", "crash")


@pytest.mark.parametrize(
    "content",
    [
        None,
        "",
        RIGHT,
        "```python\n" + RIGHT,
        block(RIGHT) + "\n" + block(RIGHT),
        block("def g(xs): return xs"),
        block("f = lambda xs: xs"),
        block("def f(xs) return xs"),
        block("x" * 30_000),
        block("-" * 9_000 + "1"),
        block("(" * 3_000),
        block("def f(xs): return '\0'"),
    ],
    ids=["none", "empty", "no block", "open block", "two blocks", "other name", "lambda", "syntax", "huge", "deep", "open", "null byte"],
)
def test_unparsable_answers_start_no_sandbox(domain, monkeypatch, content):
    monkeypatch.setattr("domains.code.run_many", lambda sandbox, jobs, slots: [] if not jobs else pytest.fail("a sandbox was started"))
    found = verdict(domain, content)
    assert (found.reward, found.status) == (0.0, "unparsable")


def test_unfinished_and_broken_turns(domain):
    right = turn(block(RIGHT))
    broken = [sample(DOUBLE, right, truncated=True), sample(DOUBLE), sample(DOUBLE, turn("", error="no end")), sample(DOUBLE, right, right)]
    assert {(v.reward, v.status) for v in domain.grade(broken)} == {(0.0, "unparsable")}


def test_a_verdict_is_remembered_but_not_a_failure_of_ours(domain, monkeypatch):
    program = block("def f(xs):\n    return [x + x for x in xs]")
    calls = []

    def lost(sandbox, jobs, slots):
        calls.append(len(jobs))
        return [CaseResults("infrastructure", [CaseOutput(False, None, "")] * 2, 0.0, "no sandbox") for _ in jobs]

    with monkeypatch.context() as patch:
        patch.setattr("domains.code.run_many", lost)
        assert [verdict(domain, program).status for _ in range(2)] == ["infrastructure"] * 2
        assert calls == [1, 1]
    assert verdict(domain, program).reward == 1
    monkeypatch.setattr("domains.code.run_many", lost)
    assert [v.reward for v in domain.grade([sample(DOUBLE, turn(program))] * 3)] == [1, 1, 1]
    assert calls == [1, 1, 0]


def test_the_expected_answers_never_enter_the_sandbox(domain, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "domains.code.run_many", lambda sandbox, jobs, slots: seen.extend(jobs) or [CaseResults("crash", [], 0.0, "")] * len(jobs)
    )
    verdict(domain, block(RIGHT + "\n# new"))
    assert seen == [(RIGHT + "\n# new\n", "f", [[[]], [[1, 2]]])]
