"""Start child processes from a thread that lives as long as the process."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
_SPAWNERS: dict[int, ThreadPoolExecutor] = {}
_LOCK = threading.Lock()


def start_from_lasting_thread(start: Callable[[], T]) -> T:
    """Call `start` in this process's spawner thread and return what it returns.

    A child that asked to die with its parent (PR_SET_PDEATHSIG) is killed when the *thread* that started it ends, so a
    long-lived child must not be started by a passing thread. A forked process makes a spawner of its own.
    """
    with _LOCK:
        if os.getpid() not in _SPAWNERS:
            _SPAWNERS[os.getpid()] = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sandbox-spawner")
        spawner = _SPAWNERS[os.getpid()]
    return spawner.submit(start).result()
