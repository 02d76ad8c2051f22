"""Find out, by trying, how this machine can isolate a process."""

from __future__ import annotations

import functools
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from domains.sandbox.cell import Cell, Limits, Recipe

INSTALL_HINT = "apt-get install bubblewrap"
"""The one command that brings the sandbox to a Debian-like machine (as root, or with sudo before it)."""
_NAMESPACES_HINT = (
    f"bubblewrap comes from: {INSTALL_HINT}. Where it is installed and refused, let users make namespaces "
    "(sysctl kernel.unprivileged_userns_clone=1, or kernel.apparmor_restrict_unprivileged_userns=0 on Ubuntu), "
    "or leave the container that forbids it."
)
BACKENDS = ("bwrap", "bwrap-clone-filter")
"""Safe backends, the safest first."""
_TRUSTED_PATH = "/usr/bin:/bin:/usr/local/bin"
_SYSTEM_PYTHON = "/usr/bin/python3"
_TOOLS = ("/usr/bin/setpriv", "/usr/bin/prlimit")

_SELF_TEST = b"""
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
assert libc.unshare(0x10000000) == -1, "a user namespace could be made"
assert libc.socket(2, 1, 0) == -1, "a socket could be made"
assert os.getpid() == 1, "the process sees others"
os.write(RESULT_FD, b"isolated")
"""


class SandboxUnavailable(RuntimeError):
    """No safe way to run model-written code was found; the message says what was tried and what to install."""


def doctor() -> dict[str, Any]:
    """Probe this machine.

    Returns:
        `uid`, `kernel`, `machine`, `python` (interpreter inside, "" without one), `bwrap` (path, "" without it),
        `bwrap_version`, `user_namespaces` (their limit, "" where the kernel does not say), `seccomp` (a BPF filter is
        accepted), `disable_userns` (bubblewrap's flag works), `backend` (the one `auto` takes, "" when none is safe)
        and `failures` (backend -> why it was not taken).
    """
    limit = Path("/proc/sys/user/max_user_namespaces")
    recipes, failures = _probe()
    bwrap = shutil.which("bwrap", path=_TRUSTED_PATH) or ""
    return {
        "uid": os.getuid(),
        "kernel": platform.release(),
        "machine": platform.machine(),
        "python": _interpreter(),
        "bwrap": bwrap,
        "bwrap_version": _version(bwrap),
        "user_namespaces": limit.read_text().strip() if limit.exists() else "",
        "seccomp": bool(recipes),
        "disable_userns": "bwrap" in recipes,
        "backend": next((name for name in BACKENDS if name in recipes), ""),
        "failures": dict(failures),
    }


def recipe_for(backend: str) -> Recipe:
    """Take the recipe of a safe backend.

    Args:
        backend: one of `BACKENDS`, or `auto` for the safest that works.

    Raises:
        SandboxUnavailable: it does not work here.
        ValueError: no such backend.
    """
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"sandbox.backend: got {backend!r}, expected one of {('auto', *BACKENDS)}")
    recipes, failures = _probe()
    for name in BACKENDS if backend == "auto" else (backend,):
        if name in recipes:
            return recipes[name]
    tried = "; ".join(f"{name}: {why}" for name, why in failures.items())
    remedy = _NAMESPACES_HINT if shutil.which("bwrap", path=_TRUSTED_PATH) else f"Install it with: {INSTALL_HINT}."
    raise SandboxUnavailable(
        f"No safe sandbox for model-written code (sandbox.backend={backend}). Tried: {tried}. {remedy} "
        "On a throw-away machine only, sandbox.allow_unsafe=true runs it unprotected."
    )


def unsafe_recipe() -> Recipe:
    """Build the recipe that isolates nothing but resource limits and, for root, the user."""
    python = _interpreter()
    # An interpreter in a private home cannot be run by anybody else.
    return Recipe(backend="unsafe", python=python or sys.executable, bwrap="", drops_root=bool(python) and _drops_root())


@functools.cache
def _probe() -> tuple[dict[str, Recipe], dict[str, str]]:
    """Try every safe backend, once per process."""
    bwrap = shutil.which("bwrap", path=_TRUSTED_PATH)
    python = _interpreter()
    missing = [tool for tool in _TOOLS if not Path(tool).exists()]
    reason = ""
    if bwrap is None:
        reason = f"bwrap not found in {_TRUSTED_PATH}"
    elif not python:
        reason = f"no {_SYSTEM_PYTHON}, and {os.path.realpath(sys.executable)} is not under /usr (apt-get install python3-minimal)"
    elif missing:
        reason = f"missing {', '.join(missing)} (apt-get install util-linux)"
    if bwrap is None or reason:
        return {}, dict.fromkeys(BACKENDS, reason)
    recipes, failures = {}, {}
    for backend in BACKENDS:
        recipe = Recipe(backend=backend, python=python, bwrap=bwrap, drops_root=_drops_root())
        failure = _self_test(recipe)
        if not failure:
            recipes[backend] = recipe
        else:
            failures[backend] = failure
    return recipes, failures


def _self_test(recipe: Recipe) -> str:
    """Run a program that tries what must fail; returns why the recipe is not safe, or an empty string."""
    try:
        cell = Cell(recipe, _SELF_TEST, Limits(memory_mib=512))
    except (OSError, ValueError) as error:
        return str(error)
    try:
        reason = cell.pump(10.0, until=lambda: False)
    finally:
        code = cell.kill()
    if code == 0 and bytes(cell.result) == b"isolated":
        return ""
    lines = cell.stderr.decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else f"self-test {reason}, exit code {code}"


def _interpreter() -> str:
    """Find a Python that an unprivileged user can run inside, which sees only /usr; empty without one."""
    own = os.path.realpath(sys.executable)
    for path in (_SYSTEM_PYTHON, own):
        if path.startswith("/usr/") and os.access(path, os.X_OK):
            return path
    return ""


def _drops_root() -> bool:
    """Tell whether we are a root that must and can become somebody else.

    In a rootless container uid 0 is an ordinary user outside, and often the only uid there is.
    """
    if os.getuid() != 0:
        return False
    ranges = [line.split() for line in Path("/proc/self/uid_map").read_text().splitlines()]
    return any(int(first) <= 60_000 and int(first) + int(count) >= 65_000 for first, _, count in ranges)


def _version(bwrap: str) -> str:
    if not bwrap:
        return ""
    return subprocess.run([bwrap, "--version"], capture_output=True, text=True, timeout=10, check=False).stdout.strip()
