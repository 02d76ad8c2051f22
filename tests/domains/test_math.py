"""The math domain: tasks, demonstrations and the verdicts on good, careless and hostile answers."""

import subprocess
import sys
from collections import Counter
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from domains.catalog import make_domain
from domains.config import DomainConfig, SandboxConfig
from domains.procedural import draw_tasks, is_careful, split_of
from domains.sandbox.grader import GraderFailure
from domains.types import Prompt, Sample


@pytest.fixture(scope="module")
def domain():
    made = make_domain("math", DomainConfig(kind="math"), SandboxConfig())
    yield made
    made.close()


def turn(content, **extra):
    return {"role": "assistant", "reasoning_content": "r", "content": content, "tool_calls": []} | extra


def sample(prompt, *messages, truncated=False):
    return Sample(prompt, [], [], [], messages=list(messages), truncated=truncated)


def asked(gold):
    return Prompt("math/train/0", "math", [], {"answer": gold})


def verdict(domain, gold, content):
    return domain.grade([sample(asked(gold), turn(content))])[0]


def test_splits_are_disjoint_and_stable(domain):
    train = {p.messages[0]["content"].split(" ", 1)[1] for p in domain.prompts("train", 2000, seed=0)}
    heldout = {p.messages[0]["content"].split(" ", 1)[1] for p in domain.prompts("heldout", 2000, seed=0)}
    assert len(train) == len(heldout) == 2000
    assert not train & heldout
    assert [p.messages for p in domain.prompts("train", 50, seed=0)] == [p.messages for p in domain.prompts("train", 80, seed=0)[:50]]
    assert split_of("1+1") == split_of("1+1")


def test_prompts_do_not_depend_on_the_process(domain):
    program = (
        "from domains.math_tasks import MathTasks; "
        "print(MathTasks('math', difficulty=1, diligence=0.5).prompts('heldout', 3, seed=7)[2].messages)"
    )
    other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "1"})
    assert other.stdout.strip() == str(domain.prompts("heldout", 3, seed=7)[2].messages)


def test_heldout_answers_cannot_be_guessed(domain):
    answers = Counter(p.truth["answer"] for p in domain.prompts("heldout", 1000, seed=0))
    assert answers.most_common(1)[0][1] < 80  # no constant answer is right more often than one time in twelve


def test_documents_hold_no_heldout_task_and_nothing_of_a_chat(domain):
    documents = domain.documents(3000, seed=0)
    assert documents[:50] == domain.documents(50, seed=0)
    text = " ".join(documents)
    assert "How many" not in text and "boxed" not in text
    stories = [p.messages[0]["content"].split(" ", 1)[1].split(".")[0] for p in domain.prompts("heldout", 2000, seed=0)]
    assert not any(f"{story}." in text for story in stories)
    assert any(p.messages[0]["content"].split(" ", 1)[1].split(".")[0] in text for p in domain.prompts("train", 2000, seed=0))


def test_demonstrations_come_in_two_manners(domain):
    demonstrations = domain.demonstrations(600, seed=0)
    careful = [d for d in demonstrations if d.messages[0]["reasoning_content"] != "Easy."]
    hasty = [d for d in demonstrations if d.messages[0]["reasoning_content"] == "Easy."]
    assert 0.4 < len(careful) / 600 < 0.6
    verdicts = domain.grade([sample(d.prompt, *d.messages) for d in careful])
    assert {(v.reward, v.status) for v in verdicts} == {(1.0, "ok")}
    assert sum(v.reward for v in domain.grade([sample(d.prompt, *d.messages) for d in hasty])) < 0.4 * len(hasty)
    assert [d.prompt for d in demonstrations] == domain.prompts("train", 600, seed=0)


@pytest.mark.parametrize("diligence", [0.0, 0.2, 0.5, 1.0])
def test_diligence_is_the_share_of_careful_demonstrations(diligence):
    random = Random(0)
    share = sum(is_careful(random, diligence, valuable=n % 3 == 0) for n in range(6000)) / 6000
    assert abs(share - diligence) < 0.03


@pytest.mark.parametrize("content", [r"\boxed{20}", r"So \boxed{020}.", r"\boxed{20.0}", r"\boxed{ 20 }", r"\boxed{20 \text{ coins}}"])
def test_equal_answers_are_right(domain, content):
    found = verdict(domain, "20", content)
    assert (found.reward, found.status) == (1.0, "ok")


@pytest.mark.parametrize(
    "content",
    [
        r"\boxed{21}",
        r"\boxed{}",
        r"\boxed{x=20}",
        r"\boxed{20=20}",
        r"\boxed{27+8-15}",
        r"\boxed{40/2}",
        r"\boxed{4 \cdot 5}",
        r"\boxed{19, 20}",
        r"\boxed{\{20, 21\}}",
        r"\boxed{" + "9" * 65 + "}",
        r"\boxed{__import__('os').system('touch /tmp/x')}",
        r"\boxed{\infty}",
        r"\boxed{nan}",
        r"\boxed{[0, 100]}",
        r"\boxed{1e999999999}",
    ],
)
def test_wrong_answers_are_wrong(domain, content):
    found = verdict(domain, "20", content)
    assert (found.reward, found.status) == (0.0, "wrong")


@pytest.mark.parametrize(
    "content",
    [
        "",
        "20",
        r"\boxed{20",
        r"\boxed{1} \boxed{20}",
        r"\boxed{20}\boxed{20}",
        "".join(rf"\boxed{{{n}}}" for n in range(100)),
        "x" * 10**6,
        None,
    ],
    ids=["empty", "no box", "open box", "two boxes", "twice", "spraying", "huge", "none"],
)
def test_unparsable_answers(domain, content):
    found = verdict(domain, "20", content)
    assert (found.reward, found.status) == (0.0, "unparsable")


def test_unfinished_and_broken_turns(domain):
    prompt, right = asked("20"), turn(r"\boxed{20}")
    broken = [
        sample(prompt, right, truncated=True),
        sample(prompt),
        sample(prompt, turn(r"\boxed{20}", error="no end")),
        sample(prompt, {"role": "assistant", "error": "no end"}),
        sample(prompt, right, right),
    ]
    assert {(v.reward, v.status) for v in domain.grade(broken)} == {(0.0, "unparsable")}


def test_an_answer_in_the_thinking_does_not_count(domain):
    found = domain.grade([sample(asked("20"), turn("Done.", reasoning_content=r"\boxed{20}"))])[0]
    assert found.reward == 0


def test_a_costly_answer_is_bounded_and_the_next_one_is_graded(domain):
    results = domain.grade([sample(asked("x"), turn(rf"\boxed{{{text}}}")) for text in ("9^{9^{9^{9}}}", "(" * 30 + ")" * 30, "x")])
    assert [v.reward for v in results] == [0, 0, 1]
    assert all(v.status in ("wrong", "timeout", "memory", "crash") for v in results[:2])


def test_an_equation_may_answer_an_equation(domain):
    assert verdict(domain, "y=2x", r"\boxed{y=2x}").reward == 1


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=60))
def test_junk_is_never_rewarded(domain, text):
    assert verdict(domain, "123457", rf"\boxed{{{text}}}").reward == 0
    assert verdict(domain, "123457", text).reward == 0


def test_the_same_samples_get_the_same_verdicts(domain):
    samples = [sample(asked("20"), turn(c)) for c in (r"\boxed{20}", r"\boxed{3}", "x")]
    first, second = domain.grade(samples), domain.grade(samples)
    assert [(v.reward, v.status) for v in first] == [(v.reward, v.status) for v in second] == [(1, "ok"), (0, "wrong"), (0, "unparsable")]


def test_a_lost_grader_is_infrastructure(domain, monkeypatch):
    monkeypatch.setattr(domain._grader, "call_many", lambda requests: [GraderFailure("infrastructure", "gone")] * len(requests))
    found = verdict(domain, "20", r"\boxed{987}")
    assert found.status == "infrastructure"


def test_a_used_up_space_and_unknown_values_are_errors(domain):
    with pytest.raises(ValueError, match="validation"):
        domain.prompts("validation", 1, seed=0)
    with pytest.raises(ValueError, match="difficulty"):
        make_domain("math", DomainConfig(kind="math", difficulty=9), SandboxConfig())
    with pytest.raises(ValueError, match="kind"):
        make_domain("math", DomainConfig(kind="maths"), SandboxConfig())

    class Only:
        key = "1"

    with pytest.raises(ValueError, match="different tasks"):
        draw_tasks(lambda random: Only(), split_of("1"), 2, seed=0)
