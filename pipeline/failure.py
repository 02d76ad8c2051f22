"""Tell a person why a step failed: the root cause, its last frames, where the log is, what was kept."""

from __future__ import annotations

import errno
import re
import shutil
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ray.exceptions import RayTaskError

if TYPE_CHECKING:  # execute is what raises; only its Settings are named here
    from pipeline.execute import Settings

FRAMES = 4
FULL_BYTES = 16 * 2**20


class StepFailed(Exception):
    """One or more steps failed.

    Attributes:
        failures: name of the step and what it raised, in the order they failed.
    """

    def __init__(self, failures: Sequence[tuple[str, Exception]]) -> None:
        super().__init__("; ".join(f"{name}: {type(error).__name__}: {error}" for name, error in failures))
        self.failures = list(failures)


def describe(failure: StepFailed, settings: Settings, *, kept: Sequence[str]) -> str:
    """Say in one message what failed, why, where to read on, and how to go on.

    Args:
        failure: the failed steps.
        settings: of the run, for its paths.
        kept: lines on what the next attempt finds.
    """
    lines = []
    for name, error in failure.failures:
        cause, frames = root_cause(error)
        lines += [f"error: step {name} failed: {type(cause).__name__}: {cause}", *(f"  {frame}" for frame in frames)]
        if (isinstance(cause, OSError) and cause.errno == errno.ENOSPC) or shutil.disk_usage(settings.run_dir).free < FULL_BYTES:
            lines.append(f"  the disk of {settings.run_dir} is full; free some space, nothing half-written was committed")
        lines.append(f"  log: {settings.run_dir / 'logs' / f'{name}.log'}")
    lines += ["kept:", *(f"  {line}" for line in kept)] if kept else ["nothing was kept: no step got as far as a checkpoint"]
    lines.append("the same command goes on from there")
    return "\n".join(lines)


def root_cause(error: Exception) -> tuple[BaseException, list[str]]:
    """Follow an exception that crossed Ray to where it was raised.

    Returns:
        The first exception and its last frames, innermost last, as `path:line in function: source`.
    """
    text = ""
    cause: BaseException = error
    while isinstance(cause, RayTaskError):
        text = str(cause)  # the remote traceback
        inner = cause.cause
        if not isinstance(inner, BaseException):
            break
        cause = inner
    if not text:
        text = "".join(traceback.format_exception(cause))
    frames = re.findall(r'File "([^"]+)", line (\d+), in (\S+)\n +(.+)', re.sub(r"\x1b\[[0-9;]*m", "", text))
    return cause, [f"{path}:{line} in {function}: {source.strip()}" for path, line, function, source in frames[-FRAMES:]]
