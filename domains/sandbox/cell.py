"""One isolated process: how it is started, watched and killed. Knows the backends, not what runs inside."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from domains.sandbox.seccomp import filter_program

MEMORY_EXIT = 77
"""Exit code of `inside_start.py` after an uncaught MemoryError."""
_START = Path(__file__).with_name("inside_start.py").read_text()
_PROCESSES, _FILE_BYTES, _SHM_BYTES, _INODES = 16, 16 << 20, 4 << 20, 20_000
_ERROR_TAIL = 4096
_WATCH_S = 0.1
_START_UP_S = 20.0
"""A Python start takes 25 ms; a machine that needs this long has failed us, not the candidate."""
_UIDS = itertools.count(os.getpid() * 16)


@dataclass(frozen=True)
class Recipe:
    """How this machine isolates a process.

    Attributes:
        backend: `bwrap`, `bwrap-clone-filter` or `unsafe`.
        python: interpreter inside; standard library only.
        bwrap: path of bubblewrap, empty for `unsafe`.
        drops_root: run under an unprivileged uid of its own (we are root).
    """

    backend: str
    python: str
    bwrap: str
    drops_root: bool


@dataclass(frozen=True)
class Limits:
    """What one cell may use; `cpu_s` of None leaves only the wall clock of each call."""

    memory_mib: int
    output_bytes: int = 1 << 20
    cpu_s: int | None = None


def command(recipe: Recipe, limits: Limits, *, fds: dict[str, int]) -> list[str]:
    """Build the command line of a cell.

    Limits are set by `prlimit` inside the user namespace: outside, the dying processes of one fork bomb would count
    against the next cell. `--as-pid-1` keeps bubblewrap's own process, and its environment, out of the cell's /proc.

    Args:
        recipe: the backend.
        limits: resource limits.
        fds: `seccomp` and `info` for bubblewrap, `program` and `result` for the program.

    Source: our measurements on Debian 12, kernel 6.18, bubblewrap 0.8.
    """
    words: list[str] = []
    if recipe.drops_root:
        uid = 60_000 + next(_UIDS) % 5000
        words += ["/usr/bin/setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "--inh-caps=-all"]
        words += ["--bounding-set=-all", "--no-new-privs"]
    if recipe.bwrap:
        words += [recipe.bwrap, "--info-fd", str(fds["info"]), "--seccomp", str(fds["seccomp"])]
        words += ["--unshare-user", "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
        words += ["--disable-userns"] if recipe.backend == "bwrap" else []
        words += ["--die-with-parent", "--new-session", "--cap-drop", "ALL", "--uid", "65534", "--gid", "65534", "--as-pid-1"]
        words += ["--ro-bind", "/usr", "/usr", "--symlink", "usr/lib", "/lib", "--symlink", "usr/lib64", "/lib64"]
        words += ["--symlink", "usr/bin", "/bin", "--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]
        words += ["--proc", "/proc", "--dev", "/dev", "--size", str(_FILE_BYTES), "--tmpfs", "/tmp"]
        words += ["--size", str(_SHM_BYTES), "--tmpfs", "/dev/shm", "--remount-ro", "/dev", "--remount-ro", "/"]
        words += ["--chdir", "/tmp", "--clearenv", "--setenv", "PATH", "/usr/bin", "--setenv", "HOME", "/tmp"]
        words += ["--setenv", "LANG", "C.UTF-8", "--hostname", "sandbox"]
    words += ["/usr/bin/prlimit", f"--nproc={_PROCESSES}", f"--as={limits.memory_mib << 20}", f"--fsize={_FILE_BYTES}"]
    words += ["--nofile=64", "--core=0"] + ([f"--cpu={limits.cpu_s}"] if limits.cpu_s is not None else [])
    return [*words, recipe.python, "-I", "-S", "-c", _START, str(fds["program"]), str(fds["result"])]


class Cell:
    """A running isolated process with bounded output, a watched memory and a clean end.

    Attributes:
        started: the program's own code has begun; whatever happens from here on is the program's doing.
        stdout, result: what came so far, at most `limits.output_bytes` each; `stderr` holds the last 4 KiB.
    """

    def __init__(self, recipe: Recipe, program: bytes, limits: Limits) -> None:
        """Start `program`.

        Raises:
            OSError: no process, file descriptor or memory to be had; ours, not the program's.
        """
        self._recipe, self._limits = recipe, limits
        self.stdout, self.stderr, self.result = bytearray(), bytearray(), bytearray()
        self.started = False
        self._child_pid = 0
        self._noise = 0
        self._info = bytearray()
        self._pending = memoryview(b"")
        self._writing = False
        self._selector = selectors.DefaultSelector()
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(self._selector.close)
            with contextlib.ExitStack() as childs_ends:
                self._spawn(program, childs_ends, on_failure)
            on_failure.pop_all()

    def _spawn(self, program: bytes, childs_ends: contextlib.ExitStack, on_failure: contextlib.ExitStack) -> None:
        fds = {"seccomp": _memory_file("seccomp", filter_program()), "program": _memory_file("program", program)}
        for fd in fds.values():
            childs_ends.callback(os.close, fd)
        for name in ("info", "result"):
            ours, fds[name] = os.pipe()
            childs_ends.callback(os.close, fds[name])
            on_failure.callback(os.close, ours)
            self._listen(ours, name)
        # A plain exec: a fork would carry the trainer's memory, secrets and expected answers inside, and copy its page tables.
        self._process = subprocess.Popen(
            command(self._recipe, self._limits, fds=fds),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"},
            cwd="/" if self._recipe.bwrap else "/tmp",
            start_new_session=True,
            pass_fds=tuple(fds.values()),
            bufsize=0,
        )
        assert self._process.stdin and self._process.stdout and self._process.stderr
        os.set_blocking(self._process.stdin.fileno(), False)
        self._listen(self._process.stdout.fileno(), "stdout")
        self._listen(self._process.stderr.fileno(), "stderr")

    def _listen(self, fd: int, name: str) -> None:
        os.set_blocking(fd, False)
        self._selector.register(fd, selectors.EVENT_READ, name)

    def send(self, data: bytes, *, then_close: bool) -> None:
        """Queue bytes for standard input; `pump` writes them."""
        self._pending = memoryview(bytes(self._pending) + data)
        self._closes_stdin = then_close
        self._noise = 0
        if not self._writing and self._process.stdin and not self._process.stdin.closed:
            self._selector.register(self._process.stdin, selectors.EVENT_WRITE, "stdin")
            self._writing = True

    def pump(self, timeout_s: float, until: Callable[[], bool]) -> str:
        """Move bytes until `until()` holds or the cell ends or breaks a limit; kills nothing.

        The clock of `timeout_s` starts when the program's own code does.

        Returns:
            `done`, `ended` (the process is gone), `timeout`, `memory` or `output`.
        """
        deadline = time.monotonic() + (timeout_s if self.started else _START_UP_S)
        watch = time.monotonic() + _WATCH_S
        while not until():
            now = time.monotonic()
            if now >= deadline:
                return "timeout"
            if now >= watch:
                watch = now + _WATCH_S
                if self._exceeds_memory():
                    return "memory"
            was_started = self.started
            if not self._outputs_open():
                if self._process.poll() is not None:
                    return "ended"
                time.sleep(0.001)
                continue
            for key, _ in self._selector.select(min(deadline, watch) - now):
                self._serve(key)
            if self.started and not was_started:
                deadline = time.monotonic() + timeout_s
            if max(len(self.stdout), len(self.result), self._noise) > self._limits.output_bytes:
                return "output"
        return "done"

    def _outputs_open(self) -> bool:
        return len(self._selector.get_map()) > int(self._writing)

    def _serve(self, key: selectors.SelectorKey) -> None:
        if key.data == "stdin":
            self._write_stdin()
            return
        try:
            data = os.read(key.fd, 1 << 16)
        except BlockingIOError:
            return
        if not data:
            self._selector.unregister(key.fd)
            if key.data in ("info", "result"):
                os.close(key.fd)
        elif key.data == "info":
            self._info += data
            with contextlib.suppress(json.JSONDecodeError):
                self._child_pid = json.loads(self._info)["child-pid"]
        elif key.data == "stderr":
            self._noise += len(data)
            self.stderr = (self.stderr + data)[-_ERROR_TAIL:]
        elif key.data == "stdout":
            self.stdout += data
        else:
            self.result += data
            if not self.started:
                self.started = True
                del self.result[:1]

    def _write_stdin(self) -> None:
        stdin = self._process.stdin
        assert stdin is not None
        gone = False
        try:
            if self._pending:
                self._pending = self._pending[os.write(stdin.fileno(), self._pending[: 1 << 16]) :]
        except BlockingIOError:
            return
        except BrokenPipeError:
            gone = True
        if gone or not self._pending:
            self._pending = memoryview(b"")
            self._selector.unregister(stdin)
            self._writing = False
            if gone or self._closes_stdin:
                stdin.close()

    def _exceeds_memory(self) -> bool:
        """Tell whether the processes of the cell hold more than their share of memory, or of inodes, together."""
        if not self._recipe.bwrap:
            return _resident_bytes([self._process.pid]) > self._limits.memory_mib << 20
        if not self._child_pid:
            return False
        if _resident_bytes(_namespace_members(self._child_pid)) > self._limits.memory_mib << 20:
            return True
        if not self.started:
            return False  # Until bubblewrap has changed the root, /tmp is this machine's.
        try:
            files = os.statvfs(Path("/proc", str(self._child_pid), "root", "tmp"))
        except OSError:
            return False  # The cell ended between two looks.
        return files.f_files - files.f_ffree > _INODES

    def kill(self) -> int:
        """Kill everything in the cell, reap it and release its pipes; idempotent.

        The namespace's first process goes first: killing the outer one leaves the namespace dying for about 100 ms.

        Returns:
            The exit code, negative or 128 + n after signal n.
        """
        if self._process.returncode is None and self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                if self._child_pid:
                    os.kill(self._child_pid, signal.SIGKILL)
                else:
                    os.killpg(self._process.pid, signal.SIGKILL)
            try:
                self._process.wait(timeout=2.0)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
        code = self._process.wait()
        if not self._recipe.bwrap:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        for key in list(self._selector.get_map().values()) if self._selector.get_map() else []:
            self._selector.unregister(key.fileobj)
            if key.data in ("info", "result"):
                os.close(key.fd)
        self._selector.close()
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            if pipe is not None:
                pipe.close()
        return code


def _memory_file(name: str, data: bytes) -> int:
    """Put bytes behind a fresh descriptor: one per cell, because bubblewrap consumes the offset."""
    fd = os.memfd_create(name)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        os.lseek(fd, 0, os.SEEK_SET)
        fcntl.fcntl(fd, fcntl.F_SETFD, fcntl.FD_CLOEXEC)
    except OSError:
        os.close(fd)
        raise
    return fd


def _namespace_members(pid: int) -> list[int]:
    """List every process that shares the pid namespace of `pid`; those we may not look at are not ours."""
    members = []
    try:
        namespace = os.readlink(f"/proc/{pid}/ns/pid")
    except OSError:
        return []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                if os.readlink(f"/proc/{name}/ns/pid") == namespace:
                    members.append(int(name))
            except OSError:
                continue
    return members


def _resident_bytes(pids: list[int]) -> int:
    total = 0
    for pid in pids:
        try:
            total += int(Path(f"/proc/{pid}/statm").read_bytes().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except (OSError, IndexError):
            continue  # It ended between two looks.
    return total
