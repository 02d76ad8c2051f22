"""Serve one scoring function over JSON lines, in a process of its own that a `GraderProcess` may kill at any time.

The first line of standard input says `target` (`module:function`, a function request-dict -> response-dict), `path`
(the caller's import path), `memory_bytes` and `parent` (its pid). Answers `{"ready": true}` once the target is imported,
then one line a request: `{"answer": ...}`, `{"error": text}` or `{"memory": true}`.
"""

import ctypes
import importlib
import json
import os
import resource
import signal
import sys

_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS, _SECCOMP_MODE_FILTER = 1, 22, 38, 2


class _FilterProgram(ctypes.Structure):
    """`struct sock_fprog` of linux/filter.h."""

    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_char_p)]


def _protect(libc: ctypes.CDLL, memory_bytes: int) -> None:
    """Give up what scoring does not need: memory beyond its share, writing files, processes, signals, the network."""
    from domains.sandbox.seccomp import filter_program  # The import path is known only now.

    for limit, value in ((resource.RLIMIT_AS, memory_bytes), (resource.RLIMIT_CORE, 0), (resource.RLIMIT_FSIZE, 0)):
        resource.setrlimit(limit, (value, value))
    code = filter_program(for_scorer=True)
    program = _FilterProgram(len(code) // 8, code)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(program)):
        raise OSError(ctypes.get_errno(), "this kernel takes no seccomp filter")


def main() -> None:
    """Serve until standard input ends."""
    setup = json.loads(sys.stdin.readline())
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != setup["parent"]:
        sys.exit("the parent is gone")
    # The protocol keeps a descriptor of its own: whatever the scorer's packages print goes to standard error.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    sys.path[:] = setup["path"]
    module, _, function = setup["target"].partition(":")
    target = getattr(importlib.import_module(module), function)
    _protect(libc, setup["memory_bytes"])
    answers.write('{"ready": true}\n')
    for line in sys.stdin:
        try:
            reply = json.dumps({"answer": target(json.loads(line))}, allow_nan=False)
        except MemoryError:
            reply = '{"memory": true}'
        except Exception as error:  # noqa: BLE001  (a scorer may fail in any way on a model's text; the caller reports it, typed)
            reply = json.dumps({"error": f"{type(error).__name__}: {error}"[:500]})
        answers.write(reply + "\n")


main()
