"""The scorer's process: answers, failures by name, and what it may not do."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from domains.sandbox.grader import GraderFailure, GraderProcess

SCORER = """
import os, signal, socket, subprocess, sys, time

def score(request):
    print('{"answer": {"forged": true}}')
    return {"value": eval(request["do"])}

def bad(request):
    return 3
"""


@pytest.fixture
def grader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[GraderProcess]:
    """A grader that evaluates what it is asked."""
    (tmp_path / "scorer_under_test.py").write_text(SCORER)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("WANDB_API_KEY", "honeypot")
    process = GraderProcess("scorer_under_test:score", timeout_s=1.0, memory_mib=1024, recycle_after=50)
    yield process
    process.close()


def ask(grader: GraderProcess, expression: str) -> dict | GraderFailure:
    """Ask for the value of one expression."""
    return grader.call_many([{"do": expression}])[0]


def test_answers_come_in_order_from_one_process(grader: GraderProcess) -> None:
    assert grader.call_many([{"do": str(n)} for n in range(20)]) == [{"value": n} for n in range(20)]
    assert ask(grader, "os.getpid()") == ask(grader, "os.getpid()")
    assert ask(grader, "os.getpid()") != {"value": os.getpid()}


@pytest.mark.parametrize(
    ("expression", "status"),
    [
        ("time.sleep(9)", "timeout"),
        ("9 ** 9 ** 9", "timeout"),
        ("os._exit(0)", "crash"),
        ("1 / 0", "crash"),
        ("sys.exit(0)", "crash"),
        ("b'x' * 10**10", "memory"),
        ("'x' * (1 << 22)", "crash"),
        ("object()", "crash"),
        ("float('nan')", "crash"),
        ("'unbalanced", "crash"),
    ],
)
def test_a_failure_has_a_name_and_the_next_request_is_answered(grader: GraderProcess, expression: str, status: str) -> None:
    failure, answer = grader.call_many([{"do": expression}, {"do": "7"}])
    assert isinstance(failure, GraderFailure)
    assert failure.status == status
    assert answer == {"value": 7}


def test_an_alarm_that_the_scorer_ignores_does_not_save_it(grader: GraderProcess) -> None:
    begun = time.monotonic()
    ignoring = "[signal.signal(n, signal.SIG_IGN) for n in (1, 2, 14, 15)] and time.sleep(60)"
    failure = ask(grader, ignoring)
    assert isinstance(failure, GraderFailure)
    assert failure.status == "timeout"
    assert time.monotonic() - begun < 10


@pytest.mark.parametrize("request_", [{"do": object()}, {"x": float("inf")}, {}, {"do": None}], ids=["object", "inf", "empty", "none"])
def test_bad_input_never_raises(grader: GraderProcess, request_: dict) -> None:
    (failure,) = grader.call_many([request_])
    assert isinstance(failure, GraderFailure)
    assert failure.status == "crash"


@pytest.mark.parametrize(
    "expression",
    [
        "subprocess.run(['/bin/true'])",
        "os.posix_spawn('/bin/true', ['true'], {})",
        "1 / 0 if os.system('true') else 0",
        "os.fork()",
        "socket.socket()",
        "open('owned', 'w')",
        "os.open('/tmp', os.O_TMPFILE | os.O_WRONLY)",
        "os.unlink('/nonexistent-but-refused-before')",
        "os.kill(os.getppid(), 0)",
        "os.mkdir('/tmp/owned')",
        "os.chmod('/tmp', 0)",
    ],
)
def test_a_scorer_touches_nothing(grader: GraderProcess, expression: str) -> None:
    failure = ask(grader, expression)
    assert isinstance(failure, GraderFailure), failure
    assert "not permitted" in failure.detail or "ZeroDivisionError" in failure.detail


def test_a_scorer_sees_no_secret_of_ours(grader: GraderProcess) -> None:
    assert ask(grader, "'honeypot' in str(os.environ)") == {"value": False}


def test_a_child_that_dies_between_requests_is_nobodys_fault(grader: GraderProcess) -> None:
    answer = ask(grader, "os.getpid()")
    assert isinstance(answer, dict)
    os.kill(answer["value"], 9)
    time.sleep(0.05)
    assert ask(grader, "3") == {"value": 3}


def test_the_child_is_recycled(grader: GraderProcess) -> None:
    pids = {str(answer) for answer in grader.call_many([{"do": "os.getpid()"}] * 101)}
    assert len(pids) == 3


def test_threads_take_turns(grader: GraderProcess) -> None:
    answers: dict[int, list] = {}
    threads = [
        threading.Thread(target=lambda n=n: answers.update({n: grader.call_many([{"do": f"{n} + {k}"} for k in range(8)])}))
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {n: [{"value": n + k} for k in range(8)] for n in range(4)}


def test_the_child_outlives_the_thread_that_started_it(grader: GraderProcess) -> None:
    pids: list = []
    thread = threading.Thread(target=lambda: pids.append(ask(grader, "os.getpid()")))
    thread.start()
    thread.join()
    time.sleep(0.05)
    assert ask(grader, "os.getpid()") == pids[0]


def test_closing_twice_and_calling_again_works(grader: GraderProcess) -> None:
    before = len(os.listdir("/proc/self/fd"))
    assert ask(grader, "1") == {"value": 1}
    grader.close()
    grader.close()
    assert len(os.listdir("/proc/self/fd")) == before
    assert ask(grader, "2") == {"value": 2}


@pytest.mark.parametrize(("target", "status"), [("no_such_module:f", "infrastructure"), ("scorer_under_test:bad", "crash")])
def test_a_wrong_target_is_reported(grader: GraderProcess, target: str, status: str) -> None:
    other = GraderProcess(target, timeout_s=1.0, memory_mib=1024)
    (failure,) = other.call_many([{}])
    other.close()
    assert isinstance(failure, GraderFailure)
    assert failure.status == status
