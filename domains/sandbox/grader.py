"""A warm process for scorers that need third-party packages: killable, restarted, never trusted with our memory."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from domains.sandbox.spawner import start_from_lasting_thread

_CHILD = Path(__file__).with_name("inside_grader.py")
_START_UP_S = 120.0
"""Importing sympy takes 1 to 2 s; a machine under load many times that."""
_ANSWER_BYTES = 1 << 20
_ERROR_TAIL = 4096


@dataclass(frozen=True)
class GraderFailure:
    """A request that got no answer.

    Attributes:
        status: `timeout`, `memory` or `crash` (the scorer's way with this text), or `infrastructure` (ours).
        detail: one line for a person.
    """

    status: str
    detail: str


class GraderProcess:
    """Calls `module:function`, request-dict -> response-dict, in a child process; one call at a time, from any thread.

    The child is a plain exec of this interpreter, not a fork, with an environment of its own: no secret of ours is in
    it. It may not write files, start processes, send signals or reach the network. A signal-based time-out of the
    scorer works there, because it runs in a main thread; ours is SIGKILL.
    """

    def __init__(self, target: str, *, timeout_s: float, memory_mib: int, recycle_after: int = 2000) -> None:
        """Remember how to start; the child starts with the first call.

        Args:
            target: `module:function`, importable with this process's import path.
            timeout_s: wall clock of one request.
            memory_mib: address space of the child.
            recycle_after: requests that one child serves; bounds what a leaking scorer can hold.
        """
        self._target, self._timeout_s, self._memory_mib, self._recycle_after = target, timeout_s, memory_mib, recycle_after
        self._lock = threading.Lock()
        self._child: _Child | None = None
        self._served = 0

    def call_many(self, requests: Sequence[dict[str, Any]]) -> list[dict[str, Any] | GraderFailure]:
        """Answer requests in order; bad input, late or dying scorers give a `GraderFailure`, nothing raises."""
        with self._lock:
            return [self._call(request) for request in requests]

    def _call(self, request: dict[str, Any]) -> dict[str, Any] | GraderFailure:
        try:
            line = json.dumps(request, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            return GraderFailure("crash", f"the request is not JSON: {error}")
        if self._served >= self._recycle_after:
            self._stop()
        child = self._ready_child()
        if isinstance(child, GraderFailure):
            return child
        self._served += 1
        reason, reply = child.ask(line, self._timeout_s)
        match reply:
            case {"answer": dict(answer)}:
                return answer
            case {"error": str(text)}:
                return GraderFailure("crash", text)
            case {"answer": other}:
                return GraderFailure("crash", f"the scorer returned {type(other).__name__}, expected dict")
        detail = child.tail()
        self._stop()
        if reply == {"memory": True}:
            return GraderFailure("memory", "MemoryError")
        return GraderFailure("timeout", f"killed after {self._timeout_s} s") if reason == "timeout" else GraderFailure("crash", detail)

    def _ready_child(self) -> _Child | GraderFailure:
        """Give the running child, or start one; a start that fails is tried once more."""
        if self._child is not None and self._child.is_idle():
            return self._child
        self._stop()
        detail = ""
        for _ in range(2):
            try:
                child = start_from_lasting_thread(_Child)
            except OSError as error:
                detail = str(error)
                continue
            setup = {
                "target": self._target,
                "path": [entry or os.getcwd() for entry in sys.path],
                "memory_bytes": self._memory_mib << 20,
                "parent": os.getpid(),
            }
            reason, reply = child.ask(json.dumps(setup), _START_UP_S)
            if reply == {"ready": True}:
                self._child, self._served = child, 0
                return child
            child.kill()
            detail = f"{reason}: {child.tail()}"
        return GraderFailure("infrastructure", f"the scorer {self._target} did not start: {detail}")

    def _stop(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child = None
            self._served = 0

    def close(self) -> None:
        """Kill the child; idempotent, and a later call starts another."""
        with self._lock:
            self._stop()


class _Child:
    """The process and its pipes."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-B", str(_CHILD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            # One thread: the scorers do no linear algebra, and each BLAS thread would take its share of the address space.
            env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": "/nonexistent", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            cwd="/",
            start_new_session=True,
            bufsize=0,
        )
        assert self._process.stdin and self._process.stdout and self._process.stderr
        self._stdin = self._process.stdin
        self._selector = selectors.DefaultSelector()
        self._answer, self._errors = bytearray(), bytearray()
        for pipe, name in ((self._process.stdout, "stdout"), (self._process.stderr, "stderr")):
            os.set_blocking(pipe.fileno(), False)
            self._selector.register(pipe, selectors.EVENT_READ, name)
        os.set_blocking(self._stdin.fileno(), False)

    def is_idle(self) -> bool:
        """Tell whether it lives and has nothing left to say, so that whatever comes next answers the next request."""
        return self._process.poll() is None and not self._answer

    def ask(self, line: str, timeout_s: float) -> tuple[str, Any]:
        """Send one line and read one; returns (`done`, reply), or (`timeout` | `ended` | `damaged`, None)."""
        pending = memoryview(line.encode() + b"\n")
        deadline = time.monotonic() + timeout_s
        self._selector.register(self._stdin, selectors.EVENT_WRITE, "stdin")
        try:
            while b"\n" not in self._answer:
                left = deadline - time.monotonic()
                if left <= 0:
                    return "timeout", None
                for key, _ in self._selector.select(left):
                    if key.data == "stdin":
                        pending = pending[os.write(key.fd, pending[: 1 << 16]) :]
                        if not pending:
                            self._selector.unregister(self._stdin)
                    elif not self._read(key):
                        return "ended", None
        except BrokenPipeError:
            return "ended", None
        finally:
            with contextlib.suppress(KeyError):
                self._selector.unregister(self._stdin)
        answer, _, rest = bytes(self._answer).partition(b"\n")
        self._answer = bytearray(rest)
        try:
            return "done", json.loads(answer)
        except (ValueError, RecursionError):
            return "damaged", None

    def _read(self, key: selectors.SelectorKey) -> bool:
        """Take what one pipe holds; False once the answers have ended or grown past all bounds."""
        data = os.read(key.fd, 1 << 16)
        if key.data == "stderr":
            self._errors = (self._errors + data)[-_ERROR_TAIL:]
            if not data:
                self._selector.unregister(key.fileobj)
            return True
        self._answer += data
        return bool(data) and len(self._answer) <= _ANSWER_BYTES

    def tail(self) -> str:
        """Tell the last line the child wrote to standard error, and how it ended."""
        with contextlib.suppress(BlockingIOError, ValueError):
            assert self._process.stderr is not None
            self._errors += os.read(self._process.stderr.fileno(), 1 << 16)
        lines = self._errors.decode(errors="replace").strip().splitlines()
        return f"{lines[-1] if lines else 'no message'} (exit code {self._process.poll()})"

    def kill(self) -> None:
        """Kill and reap; the text for `tail` stays."""
        with contextlib.suppress(ProcessLookupError):
            if self._process.poll() is None:
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self.tail()
        self._selector.close()
        for pipe in (self._stdin, self._process.stdout, self._process.stderr):
            if pipe is not None:
                pipe.close()
