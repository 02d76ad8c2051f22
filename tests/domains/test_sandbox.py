"""Running programs in the sandbox: results, limits, sessions, backends, and whose failure it was."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from domains.config import SandboxConfig
from domains.sandbox import cell, probe
from domains.sandbox.cases import run_cases, run_many, strictly_equal
from domains.sandbox.sandbox import INSTALL_HINT, Sandbox, SandboxUnavailable, SessionLost, doctor
from domains.sandbox.seccomp import filter_program

ECHO = "import json, sys\nfor line in sys.stdin:\n    print(json.dumps({'got': json.loads(line)}), flush=True)\n"
OBEY = "import json, os, sys, time\nfor line in sys.stdin:\n    exec(json.loads(line))\n    print('1', flush=True)\n"


@pytest.fixture(scope="module", params=["bwrap", "bwrap-clone-filter"])
def sandbox(request: pytest.FixtureRequest) -> Sandbox:
    """Each safe backend in turn, or a skip that says why it does not work here."""
    try:
        return Sandbox(SandboxConfig(backend=request.param, timeout_s=2.0))
    except SandboxUnavailable as error:
        pytest.skip(str(error))


@pytest.fixture
def no_bwrap(monkeypatch: pytest.MonkeyPatch):
    """A machine without bubblewrap."""
    monkeypatch.setattr(probe.shutil, "which", lambda *_, **__: None)
    probe._probe.cache_clear()
    yield
    probe._probe.cache_clear()


def test_a_program_runs_with_its_input(sandbox: Sandbox) -> None:
    completed = sandbox.run("import sys; print(sys.stdin.read()[::-1]); print('noise', file=sys.stderr)", b"abc")
    assert (completed.status, completed.stdout, completed.stderr, completed.exit_code) == ("ok", b"cba\n", "noise\n", 0)
    assert 0 < completed.ms < 5000


@pytest.mark.parametrize("size", [0, 1, 65_536, 3_000_001], ids=str)
def test_input_of_any_size_arrives(sandbox: Sandbox, size: int) -> None:
    assert sandbox.run("import sys; print(len(sys.stdin.buffer.read()))", b"x" * size).stdout == b"%d\n" % size


def test_unread_input_is_no_failure(sandbox: Sandbox) -> None:
    assert sandbox.run("print(1)", b"x" * 1_000_000).status == "ok"


def test_a_large_program_runs(sandbox: Sandbox) -> None:
    assert sandbox.run("#" * 1_000_000 + "\nprint(1)").stdout == b"1\n"


@pytest.mark.parametrize(
    ("program", "status"),
    [
        ("1 / 0", "crash"),
        ("def (", "crash"),
        ("raise MemoryError", "memory"),
        ("while True: pass", "timeout"),
        ("raise SystemExit(3)", "crash"),
    ],
)
def test_the_status_says_how_it_ended(sandbox: Sandbox, program: str, status: str) -> None:
    assert sandbox.run(program, timeout_s=0.3).status == status


def test_output_is_bounded(sandbox: Sandbox) -> None:
    completed = sandbox.run("while True: print('x' * 1000)", output_bytes=5000)
    assert completed.status == "crash"
    assert len(completed.stdout) == 5000


def test_the_result_channel_is_apart_from_prints(sandbox: Sandbox) -> None:
    completed = sandbox.run("import os; print('noise'); os.write(RESULT_FD, b'result')")
    assert completed.result == b"result"
    assert completed.stdout == b"noise\n"


def test_overhead_is_small(sandbox: Sandbox) -> None:
    """25 ms on an idle machine; the bound catches a poll or a wait that crept in, not a slow disk."""
    times = sorted(sandbox.run("pass").ms for _ in range(9))
    assert times[2] < 250


def test_a_sandbox_that_cannot_start_is_infrastructure(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cell, "command", lambda *_, **__: ["/usr/bin/false"])
    completed = sandbox.run("print(1)")
    assert completed.status == "infrastructure"
    assert "did not start" in completed.detail


def test_files_of_the_machine_are_not_counted_before_the_cell_has_its_own_root(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cell, "_WATCH_S", 0.0)
    monkeypatch.setattr(cell, "_INODES", -1)  # any file at all is one too many: only a cell that began may say so
    assert {sandbox.run("import time; time.sleep(0.2)").status for _ in range(5)} == {"memory"}


def test_no_process_to_be_had_is_infrastructure_after_one_retry(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    attempts: list[int] = []

    def refuse(*_: object, **__: object) -> list[str]:
        attempts.append(1)
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(cell.subprocess, "Popen", refuse)
    assert sandbox.run("print(1)").status == "infrastructure"
    assert len(attempts) == 2
    assert run_cases(sandbox, "def f(): return 1", "f", [[]]).status == "infrastructure"


def test_failed_starts_leak_no_descriptor(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    sandbox.run("pass")
    before = sorted(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(cell, "command", lambda *_, **__: ["/nonexistent"])
    for _ in range(3):
        assert sandbox.run("print(1)").status == "infrastructure"
    monkeypatch.undo()
    sandbox.run("while True: pass", timeout_s=0.1)
    sandbox.session(ECHO).close()
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_a_session_answers_until_closed(sandbox: Sandbox) -> None:
    with sandbox.session(ECHO) as session:
        for request in (1, "é\n", None, [1.5, {"a": []}], "x" * 300_000):
            assert session.call(request, 2.0) == {"got": request}
    session.close()
    with pytest.raises(SessionLost, match="closed"):
        session.call(1, 1.0)


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("time.sleep(9)", "timeout"),
        ("os._exit(0)", "ended"),
        ("1 / 0", "ended"),
        ("a = b'x' * 10**10", "ended"),
        ("print('not json', flush=True)", "JSON"),
        ("while True: print('x' * 10**6, end='')", "output"),
    ],
)
def test_a_session_that_fails_is_lost(sandbox: Sandbox, code: str, why: str) -> None:
    session = sandbox.session(OBEY)
    assert session.call("pass", 1.0) == 1
    with pytest.raises(SessionLost, match=why):
        session.call(code, 1.0)
    with pytest.raises(SessionLost):
        session.call("pass", 1.0)
    session.close()


def test_a_session_that_speaks_out_of_turn_is_lost(sandbox: Sandbox) -> None:
    with sandbox.session(OBEY) as session:
        assert session.call("print('7')", 1.0) == 7
        with pytest.raises(SessionLost, match="out of turn"):
            session.call("pass", 1.0)


def test_a_bad_request_leaves_the_session_alive(sandbox: Sandbox) -> None:
    with sandbox.session(ECHO) as session:
        with pytest.raises(TypeError):
            session.call(object(), 1.0)
        assert session.call(1, 1.0) == {"got": 1}


def test_a_session_has_sqlite(sandbox: Sandbox) -> None:
    program = (
        "import json, sqlite3, sys\nbase = sqlite3.connect(':memory:')\n"
        "for line in sys.stdin:\n    print(json.dumps(base.execute(json.loads(line)).fetchall()), flush=True)\n"
    )
    with sandbox.session(program) as session:
        session.call("create table t (a)", 2.0)
        session.call("insert into t values (3), (4)", 2.0)
        assert session.call("select sum(a) from t", 2.0) == [[7]]


def test_a_session_outlives_the_thread_that_opened_it(sandbox: Sandbox) -> None:
    opened: list = []
    thread = threading.Thread(target=lambda: opened.append(sandbox.session(ECHO)))
    thread.start()
    thread.join()
    time.sleep(0.1)
    with opened[0] as session:
        assert session.call(1, 1.0) == {"got": 1}


def test_a_session_dies_with_its_process(sandbox: Sandbox) -> None:
    script = (
        "import os, sys, time\nfrom domains.config import SandboxConfig\nfrom domains.sandbox.sandbox import Sandbox\n"
        f"session = Sandbox(SandboxConfig(backend={sandbox.backend!r})).session({OBEY!r})\n"
        "print(session._cell._child_pid, flush=True)\ntime.sleep(60)\n"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(Path(cell.__file__).parents[2])}
    )
    assert owner.stdout is not None
    inside = int(owner.stdout.readline())
    assert Path(f"/proc/{inside}").exists()
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    owner.stdout.close()
    deadline = time.monotonic() + 1.0
    while _running(inside):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_cases_keep_going_after_an_exception(sandbox: Sandbox) -> None:
    results = run_cases(sandbox, "def f(a, b): return a / b", "f", [[6, 3], [1, 0], [1, 2]])
    assert results.status == "ok"
    assert [(output.ok, output.value) for output in results.outputs] == [(True, 2.0), (False, None), (True, 0.5)]
    assert "ZeroDivisionError" in results.outputs[1].error


def test_values_come_back_plain(sandbox: Sandbox) -> None:
    value: list = [None, True, 1, 1.5, "é\n\ud800", [[]], {"a": {"b": []}}, -(10**30)]
    results = run_cases(sandbox, "def f(v): return v", "f", [[value], [(1, 2)]])
    assert strictly_equal(results.outputs[0].value, value)
    assert results.outputs[1].value == [1, 2]


def test_cases_done_before_a_timeout_are_kept(sandbox: Sandbox) -> None:
    results = run_cases(Sandbox(SandboxConfig(timeout_s=0.3)), "def f(n):\n    while n: pass\n    return 5", "f", [[0], [1], [0]])
    assert results.status == "timeout"
    assert [output.ok for output in results.outputs] == [True, False, False]


def test_no_cases_are_still_a_definition(sandbox: Sandbox) -> None:
    assert run_cases(sandbox, "def f(): pass", "f", []).status == "ok"
    assert run_cases(sandbox, "def g(): pass", "f", []).status == "crash"


@pytest.mark.parametrize("slots", [1, 3])
def test_many_candidates_keep_their_order(sandbox: Sandbox, slots: int) -> None:
    jobs = [(f"def f(x): return x + {n}" if n % 3 else "1 / 0", "f", [[10]]) for n in range(7)]
    results = run_many(sandbox, jobs, slots=slots)
    assert [result.outputs[0].value for result in results] == [10 + n if n % 3 else None for n in range(7)]
    assert [result.status for result in results] == ["ok" if n % 3 else "crash" for n in range(7)]


@pytest.mark.parametrize(
    ("left", "right", "equal"),
    [(1, 1, True), (1, True, False), (1, 1.0, False), ([1, [2]], [1, [2]], True), ([1], [True], False), ({"a": 0}, {"a": False}, False)],
)
def test_strict_equality(left: object, right: object, equal: bool) -> None:
    assert strictly_equal(left, right) is equal


@pytest.mark.usefixtures("no_bwrap")
def test_without_a_safe_backend_it_refuses_and_says_what_to_install() -> None:
    with pytest.raises(SandboxUnavailable) as refusal:
        Sandbox(SandboxConfig())
    assert INSTALL_HINT in str(refusal.value)
    assert "bwrap not found" in str(refusal.value)
    assert "sandbox.allow_unsafe=true" in str(refusal.value)
    assert doctor()["backend"] == ""


def test_a_bubblewrap_that_may_not_make_namespaces_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    refusal = "echo 'bwrap: No permissions to create new namespace' >&2; exit 1"
    monkeypatch.setattr(cell, "command", lambda *_, **__: ["/bin/sh", "-c", refusal])
    monkeypatch.setattr(probe.shutil, "which", lambda *_, **__: "/usr/bin/true")
    probe._probe.cache_clear()
    with pytest.raises(SandboxUnavailable, match=r"No permissions to create new namespace.*unprivileged_userns_clone"):
        Sandbox(SandboxConfig())
    probe._probe.cache_clear()


@pytest.mark.usefixtures("no_bwrap")
def test_unsafe_runs_when_insisted_and_says_so_loudly(caplog: pytest.LogCaptureFixture) -> None:
    sandbox = Sandbox(SandboxConfig(allow_unsafe=True))
    assert sandbox.backend == "unsafe"
    assert "UNPROTECTED" in caplog.text
    assert sandbox.run("print(1)").stdout == b"1\n"
    assert sandbox.run("while True: pass", timeout_s=0.2).status == "timeout"
    assert sandbox.run("b'x' * 10**10").status == "memory"
    assert run_cases(sandbox, "def f(x): return x + 1", "f", [[1]]).outputs[0].value == 2


def test_safe_is_taken_although_unsafe_is_allowed() -> None:
    if doctor()["backend"]:
        assert Sandbox(SandboxConfig(allow_unsafe=True)).backend == doctor()["backend"]


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match=r"sandbox\.backend"):
        Sandbox(SandboxConfig(backend="docker"))


def test_doctor_speaks_json() -> None:
    found = json.loads(json.dumps(doctor()))
    assert found["uid"] == os.getuid()
    assert set(found) >= {"kernel", "bwrap", "bwrap_version", "seccomp", "disable_userns", "backend", "failures"}


ORDINARY = """
import os
from domains.config import SandboxConfig
from domains.sandbox.sandbox import Sandbox
sandbox = Sandbox(SandboxConfig())
forks = "import os, time\\nfor _ in range(9):\\n  if os.fork() == 0:\\n    a = b'x' * 200_000_000; time.sleep(9)\\ntime.sleep(9)"
print(os.getuid(), sandbox.backend, sandbox.run("print(1)").stdout.decode(), sandbox.run("1 / 0").status, sandbox.run(forks).status)
"""


@pytest.mark.skipif(os.getuid() != 0 or not Path("/usr/bin/python3").exists(), reason="needs root, to become somebody else")
def test_an_ordinary_user_is_as_safe() -> None:
    """The sources are copied to where anybody may read them: the project may lie in a private home."""
    package = Path(cell.__file__).parent
    with tempfile.TemporaryDirectory(dir="/tmp") as place:
        shutil.copytree(package, Path(place, "domains/sandbox"))
        for name in ("__init__.py", "config.py"):
            shutil.copy(package.parent / name, Path(place, "domains", name))
        for path in [Path(place), *Path(place).rglob("*")]:
            path.chmod(0o755)
        done = subprocess.run(
            ["/usr/bin/setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "/usr/bin/python3", "-B", "-c", ORDINARY],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env={"PYTHONPATH": place, "PATH": "/usr/bin:/bin"},
            cwd="/",
            timeout=60,
            check=False,
        )
    if "SandboxUnavailable" in done.stderr:
        pytest.skip(done.stderr.splitlines()[-1])
    assert done.stdout.split() == ["65534", doctor()["backend"], "1", "crash", "memory"], done.stderr


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_filter_is_well_formed(machine: str) -> None:
    for for_scorer in (False, True):
        program = filter_program(machine, for_scorer=for_scorer)
        assert len(program) % 8 == 0
        assert len(program) // 8 < 4096
        assert program[-8:] == b"\x06\x00\x00\x00\x00\x00\xff\x7f"


def test_a_machine_without_a_table_is_refused() -> None:
    with pytest.raises(ValueError, match="riscv64"):
        filter_program("riscv64")
