"""Measure the memory of all processes of a run together."""

from __future__ import annotations

import threading
from types import TracebackType

import psutil

INTERVAL_S = 0.5
PSS_EVERY = 12
"""Asking the kernel for proportional sizes takes 60 ms for a whole run, the rest 3 ms."""


class MemoryWatch:
    """Samples the driver's process tree in a thread while in a `with` block.

    Attributes:
        peak_rss_gib: largest sum of resident sizes; pages that processes share count once for each.
        peak_pss_gib: largest sum of proportional sizes; shared pages count once. 0 where the kernel does not tell.
    """

    def __init__(self) -> None:
        """Prepare; nothing is sampled before `__enter__`."""
        self.peak_rss_gib = 0.0
        self.peak_pss_gib = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory-watch", daemon=True)

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        driver, count = psutil.Process(), 0
        while not self._stop.is_set():
            processes = [driver, *driver.children(recursive=True)]
            self.peak_rss_gib = max(self.peak_rss_gib, round(sum(map(_rss, processes)) / 2**30, 3))
            if count % PSS_EVERY == 0:
                self.peak_pss_gib = max(self.peak_pss_gib, round(sum(_pss(p.pid) for p in processes) / 2**30, 3))
            count += 1
            self._stop.wait(INTERVAL_S)


def _rss(process: psutil.Process) -> int:
    try:
        return process.memory_info().rss
    except psutil.NoSuchProcess:
        return 0


def _pss(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/smaps_rollup") as file:
            return next((int(line.split()[1]) * 1024 for line in file if line.startswith("Pss:")), 0)
    except (FileNotFoundError, ProcessLookupError, PermissionError):  # ended meanwhile, or another user's, or no such kernel
        return 0
