"""The command line over a graph of toy steps, for tests that need a whole process: `python toy_run.py run +stage=all ...`.

`TOY` in the environment is a JSON object: every count waits `sleep_s`, step `fail` raises, step `full` finds the disk full.
"""

import errno
import json
import os
import signal
import sys
import time
from dataclasses import dataclass

from pipeline import stages
from pipeline.__main__ import main
from pipeline.artifacts import digest

TOY = json.loads(os.environ.get("TOY", "{}"))


@dataclass
class ToyJob:
    """How a toy step behaves."""

    steps: int
    sleep_s: float
    fail: bool
    full: bool


def toy(context, job):
    """Count to `job.steps`, keeping the count on disk, and evaluate to made-up numbers."""
    saved = context.workdir / "count"
    start = int(saved.read_text()) if saved.exists() else 0
    (context.workdir / "starts").open("a").write(f"{start}\n")
    context.tracker.resume_from(start)
    for step in range(start, job.steps):
        time.sleep(job.sleep_s)
        context.tracker.log(step, {"reward/mean": step / job.steps, "perf/tokens_per_s": 100.0, "distill/reverse_kl": 1.0 / (step + 1)})
        context.tracker.progress(step + 1, job.steps)
        saved.write_text(str(step + 1))
        if job.fail and step == 1:
            raise RuntimeError("the toy broke")
        if job.full:
            raise OSError(errno.ENOSPC, "No space left on device")
    (context.artifact / "weights.txt").write_text(" ".join(sorted(context.inputs)))
    (context.artifact / "starts.txt").write_text((context.workdir / "starts").read_text())
    kind, _, domain = context.name.partition("-")
    level = {"base": 1, "sft": 6, "grpo": 9, "warmup": 4, "distill": 9}[kind]
    passed = [int(i % 10 < level) for i in range(200)]
    found = {"pass@1": sum(passed) / 200, "n": 200, "ci95": [level / 10 - 0.05, min(1.0, level / 10 + 0.05)], "passed": passed}
    return {"evaluation": dict.fromkeys([domain] if domain else ["math", "code", "agent"], found), "tokens": 1000, "steps": job.steps}


def toy_steps(config):
    """The real graph with toy work."""
    made = []
    keys = {}
    for step in real_steps(config):
        job = ToyJob(config.base.steps, TOY.get("sleep_s", 0.0), step.name == TOY.get("fail"), step.name == TOY.get("full"))
        recipe = {"step": step.name, "steps": config.base.steps, "seed": config.seed, "inputs": {n: keys[n] for n in step.needs}}
        keys[step.name] = digest(recipe)
        made.append(stages.Step(step.name, step.kind, step.needs, toy, job, recipe, keys[step.name]))
    return made


if __name__ == "__main__":
    # Whatever runs in a shell's background, as the tests may, inherits that SIGINT is ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    real_steps, stages.steps = stages.steps, toy_steps
    sys.exit(main(sys.argv[1:]))
