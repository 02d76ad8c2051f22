"""Time on a GPU between events: medians, after runs that do not count."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

import torch


def median_ms(run: Callable[[], object], *, repeats: int = 10, warmup: int = 2) -> float:
    """Return the median time of `repeats` runs in ms, after `warmup` that do not count."""
    for _ in range(warmup):
        run()
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, stop in marks:
        start.record()
        run()
        stop.record()
    torch.cuda.synchronize()
    return median(start.elapsed_time(stop) for start, stop in marks)
