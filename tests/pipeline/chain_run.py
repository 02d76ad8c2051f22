"""The command line over steps whose numbers depend on everything before them, without Ray: `python chain_run.py run +stage=all ...`.

`CHAIN_KILL` in the environment is `step:count`: the process is killed there, as by `kill -9`, once in an output directory. `CHAIN_FULL`
names a step that finds the disk full after its first checkpoint.
"""

import errno
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

from pipeline import stages, workflow
from pipeline.__main__ import main
from pipeline.execute import execute
from runtime import checkpoint

STEPS, SAVE_EVERY, PROMPTS = 9, 3, 64


def chain(context, job):
    """Follow a pseudo-random sequence from what the inputs ended at; answer the prompts whose bit is set at the end."""
    checkpoints = context.workdir / "checkpoints"
    found = checkpoint.newest(checkpoints)
    value = context.seed + sum(int((path / "value").read_text()) for path in context.inputs.values()) + len(context.name)
    first = 0
    if found:
        first, value = found[1]["step"], found[1]["value"]
    context.tracker.resume_from(first)
    for step in range(first, STEPS):
        value = (value * 6364136223846793005 + 1442695040888963407) % 2**64
        context.tracker.log(step, {"reward/mean": value / 2**64})
        context.tracker.progress(step + 1, STEPS)
        die_once(context, step)
        if (step + 1) % SAVE_EVERY == 0:
            weights = str(value)
            checkpoint.commit(
                checkpoints, step + 1, write=lambda d, text=weights: (d / "weights").write_text(text) and None, state={"value": value}
            )
        if step == SAVE_EVERY and context.name == os.environ.get("CHAIN_FULL"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    (context.artifact / "value").write_text(str(value))
    passed = [value >> bit & 1 for bit in range(PROMPTS)]
    found = {"pass@1": sum(passed) / PROMPTS, "n": PROMPTS, "ci95": [0.0, 1.0], "passed": passed}
    return {"evaluation": {"math": found}, "tokens": value % 10**6, "steps": STEPS}


def die_once(context, step):
    """Kill this process where `CHAIN_KILL` says, unless that was done."""
    asked = os.environ.get("CHAIN_KILL", "")
    mark = context.workdir.parent / f"killed-{asked.replace(':', '-')}"
    if asked == f"{context.name}:{step}" and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)


class Here:
    """Runs steps in this process, where Ray would."""

    def __init__(self, settings):
        self.settings, self.waiting = settings, []

    def submit(self, step, inputs):
        self.waiting.append((step, inputs))

    def wait(self, timeout_s):
        step, inputs = self.waiting.pop(0)
        try:
            return [(step, execute(step, inputs, self.settings))]
        except OSError as error:
            return [(step, error)]

    def cancel(self):
        self.waiting.clear()


def start_nothing(config, flow, settings):
    """Take the place of Ray's start: two steps side by side."""
    flow.width = 2


if __name__ == "__main__":
    real_steps = stages.steps
    stages.steps = lambda config: [replace(step, run=chain) for step in real_steps(config)]
    workflow.RayTasks, workflow._start_ray = Here, start_nothing
    os.chdir(Path(__file__).parent)
    sys.exit(main(sys.argv[1:]))
