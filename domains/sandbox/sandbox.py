"""Run model-written programs in fresh or long-lived isolated processes."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from domains.config import SandboxConfig
from domains.sandbox.cell import MEMORY_EXIT, Cell, Limits, Recipe
from domains.sandbox.probe import INSTALL_HINT, SandboxUnavailable, doctor, recipe_for, unsafe_recipe
from domains.sandbox.spawner import start_from_lasting_thread

__all__ = ["INSTALL_HINT", "Completed", "Sandbox", "SandboxUnavailable", "Session", "SessionLost", "doctor"]

logger = logging.getLogger(__name__)


class SessionLost(RuntimeError):
    """A session died, was late or spoke something else than JSON lines; it is gone, open another."""


@dataclass(frozen=True)
class Completed:
    """How a program ended.

    Attributes:
        status: `ok` (exit code 0), `timeout`, `memory`, `crash`, or `infrastructure` (it never began: our failure).
        stdout: what it printed, at most the output limit.
        stderr: the last 4 KiB of its standard error.
        result: what it wrote to the descriptor that its global `RESULT_FD` names, apart from anything it prints.
        ms: milliseconds, start-up included.
        exit_code: of the process; negative or 128 + n after signal n.
        detail: one line for a person.
    """

    status: str
    stdout: bytes
    stderr: str
    result: bytes
    ms: float
    exit_code: int
    detail: str = ""


class Sandbox:
    """Runs programs of strangers, each in its own namespaces, with the standard library and nothing else.

    Attributes:
        backend: `bwrap`, `bwrap-clone-filter`, or `unsafe` where the user insisted.
    """

    def __init__(self, config: SandboxConfig) -> None:
        """Choose the backend; the machine is probed once per process.

        Raises:
            SandboxUnavailable: nothing safe works here and `allow_unsafe` is off.
            ValueError: an unknown backend.
        """
        self.config = config
        self._recipe = _choose(config)
        self.backend = self._recipe.backend

    def run(
        self,
        program: str,
        stdin: bytes = b"",
        *,
        timeout_s: float | None = None,
        memory_mib: int | None = None,
        output_bytes: int = 1 << 20,
    ) -> Completed:
        """Run a Python program in one fresh sandbox; safe to call from several threads.

        A failure of ours before the program's first line is retried once. After it, everything is the program's.

        Args:
            program: source text, run as `__main__` in an empty writable directory.
            stdin: standard input.
            timeout_s: wall clock from the program's first line; None takes the configuration's.
            memory_mib: of one process, and resident over all its processes; None takes the configuration's.
            output_bytes: more than this on any output kills it, status `crash`.
        """
        timeout_s = self.config.timeout_s if timeout_s is None else timeout_s
        memory_mib = self.config.memory_mib if memory_mib is None else memory_mib
        limits = Limits(memory_mib=memory_mib, output_bytes=output_bytes, cpu_s=math.ceil(timeout_s) + 1)
        completed = _run_once(self._recipe, _encode(program), stdin, timeout_s=timeout_s, limits=limits)
        if completed.status == "infrastructure":
            logger.warning("sandbox failed to start, trying once more: %s", completed.detail)
            completed = _run_once(self._recipe, _encode(program), stdin, timeout_s=timeout_s, limits=limits)
        return completed

    def session(self, program: str, *, memory_mib: int | None = None) -> Session:
        """Start a long-lived program that answers each JSON line on its standard input by one on its standard output.

        Raises:
            SessionLost: it could not be started, twice.
        """
        limits = Limits(memory_mib=self.config.memory_mib if memory_mib is None else memory_mib, output_bytes=16 << 20)
        try:
            return Session(self._recipe, program, limits)
        except SessionLost as error:
            logger.warning("sandbox session failed to start, trying once more: %s", error)
            return Session(self._recipe, program, limits)


class Session:
    """A sandboxed program spoken to in JSON lines; usable from any thread, one call at a time."""

    def __init__(self, recipe: Recipe, program: str, limits: Limits) -> None:
        """Start the program and wait until its first line runs.

        Raises:
            SessionLost: it could not be started.
        """
        self._lock = threading.Lock()
        self._lost = ""
        try:
            self._cell = start_from_lasting_thread(lambda: Cell(recipe, _encode(program), limits))
        except OSError as error:
            raise SessionLost(f"session could not start: {error}") from error
        reason = self._cell.pump(0.0, until=lambda: self._cell.started)
        if reason != "done":
            self._end(f"session could not start: {reason}: {_tail(self._cell)}")
            raise SessionLost(self._lost)

    def call(self, request: Any, timeout_s: float) -> Any:
        """Send one request and wait for its answer.

        Args:
            request: anything JSON can hold.
            timeout_s: wall clock; a late session is killed.

        Raises:
            SessionLost: dead, late, over a limit, closed, or not answering in JSON.
            TypeError, ValueError: the request is not JSON; the session lives on.
        """
        line = json.dumps(request, allow_nan=False).encode() + b"\n"
        with self._lock:
            if self._lost:
                raise SessionLost(self._lost)
            if self._cell.stdout:
                self._end("session spoke out of turn")
                raise SessionLost(self._lost)
            with self._ending_on_failure():
                self._cell.send(line, then_close=False)
                reason = self._cell.pump(timeout_s, until=lambda: b"\n" in self._cell.stdout)
                answer, separator, rest = bytes(self._cell.stdout).partition(b"\n")
                if not separator:
                    raise SessionLost(f"session {reason}: {_tail(self._cell)}")
                self._cell.stdout = bytearray(rest)
                try:
                    return json.loads(answer)
                except (ValueError, RecursionError) as error:
                    raise SessionLost(f"session answered something else than JSON: {error}") from error

    @contextlib.contextmanager
    def _ending_on_failure(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self._end(str(error) or type(error).__name__)
            raise

    def _end(self, why: str) -> None:
        if not self._lost:
            self._lost = why
            self._cell.kill()

    def close(self) -> None:
        """Kill the program; idempotent."""
        with self._lock:
            self._end("session closed")

    def __enter__(self) -> Session:
        """Return itself; leaving closes it."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()


def _choose(config: SandboxConfig) -> Recipe:
    try:
        return recipe_for(config.backend)
    except SandboxUnavailable as error:
        if not config.allow_unsafe:
            raise
        logger.warning("MODEL-WRITTEN CODE RUNS UNPROTECTED ON THIS MACHINE (sandbox.allow_unsafe=true). %s", error)
        return unsafe_recipe()


def _run_once(recipe: Recipe, program: bytes, stdin: bytes, *, timeout_s: float, limits: Limits) -> Completed:
    begun = time.monotonic()
    try:
        cell = Cell(recipe, program, limits)
    except OSError as error:
        return Completed("infrastructure", b"", "", b"", _ms_since(begun), -1, f"could not start: {error}")
    try:
        cell.send(stdin, then_close=True)
        reason = cell.pump(timeout_s, until=lambda: False)
    finally:
        code = cell.kill()
    status, detail = _judge(reason, code, started=cell.started)
    stderr = cell.stderr.decode(errors="replace")
    if status == "infrastructure":
        detail = f"{detail}: {stderr.strip()[-300:]}"
    stdout, result = bytes(cell.stdout[: limits.output_bytes]), bytes(cell.result[: limits.output_bytes])
    return Completed(status, stdout, stderr, result, _ms_since(begun), code, detail)


def _judge(reason: str, code: int, *, started: bool) -> tuple[str, str]:
    """Turn how a cell ended into (status, detail)."""
    if not started:
        return "infrastructure", f"the sandbox did not start ({reason}, exit code {code})"
    if reason in ("timeout", "memory"):
        return reason, f"killed: {reason} limit"
    if reason == "output":
        return "crash", "killed: too much output"
    if code == MEMORY_EXIT:
        return "memory", "MemoryError"
    return ("ok", "") if code == 0 else ("crash", f"exit code {code}")


def _encode(program: str) -> bytes:
    """Encode source text; a lone surrogate becomes bytes that Python's compiler refuses, inside."""
    return program.encode("utf-8", "surrogatepass")


def _ms_since(begun: float) -> float:
    return (time.monotonic() - begun) * 1000.0


def _tail(cell: Cell) -> str:
    return cell.stderr.decode(errors="replace").strip()[-300:]
