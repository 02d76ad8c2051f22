"""Say what a run would do: per step done, resumable, or to do, and which keys set it apart from the nearest artifact."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline import stages
from pipeline.artifacts import Store
from pipeline.config import RunConfig
from pipeline.live import duration
from pipeline.stages import Step
from runtime.checkpoint import FOLDER, newest_step

SHOWN = 4


@dataclass(frozen=True)
class Planned:
    """What would become of one step.

    Attributes:
        step: the step.
        state: `done`, `resumable at step 12`, or `to do`.
        why: the artifact that is reused, or what sets the step apart from the nearest one.
        elapsed_s: what it took when it, or its nearest, was made; None when never.
    """

    step: Step
    state: str
    why: str
    elapsed_s: float | None


def plan(config: RunConfig) -> list[Planned]:
    """Look every step of a run up, without changing anything."""
    store = Store(Path(config.output_dir) / "artifacts")
    return [_planned(step, store) for step in stages.steps(config)]


def _planned(step: Step, store: Store) -> Planned:
    if found := store.find(step.name, step.key, thorough=False):
        return Planned(step, "done", f"reuses {found.path.name}", found.manifest["elapsed_s"])
    near = store.nearest(step.name, step.recipe)
    elapsed_s = near[0].manifest["elapsed_s"] if near else None
    why = _apart(near[1]) if near else "never made"
    if near and not near[1]:
        why = f"{near[0].path.name} is damaged"
    workdir = store.workdir(step.name, step.key)
    if workdir.is_dir():
        saved = newest_step(workdir / FOLDER)
        if saved is not None:
            return Planned(step, f"resumable at step {saved}", f"interrupted, goes on in .work/{workdir.name}", elapsed_s)
        why = "interrupted before its first checkpoint"
    return Planned(step, "to do", why, elapsed_s)


def _apart(lines: list[str]) -> str:
    inputs = [line.split(":")[0].removeprefix("inputs.") for line in lines if line.startswith("inputs.")]
    own = [line.removeprefix("job.") for line in lines if not line.startswith("inputs.")]
    said = own[:SHOWN] + ([f"and {len(own) - SHOWN} more"] if len(own) > SHOWN else [])
    return "; ".join(said + ([f"follows {', '.join(inputs)}"] if inputs and not own else []))


def show(config: RunConfig) -> int:
    """Print the plan; returns the exit code."""
    console = Console()
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for title in ("step", "state", "took", "why"):
        table.add_column(title, overflow="fold")
    planned = plan(config)
    for row in planned:
        style = "green" if row.state == "done" else "yellow" if row.state.startswith("resumable") else "cyan"
        table.add_row(
            row.step.name, Text(row.state, style=style), duration(row.elapsed_s) if row.elapsed_s is not None else "?", Text(row.why)
        )
    console.print(table)
    console.print(f"artifacts in {Path(config.output_dir) / 'artifacts'}", highlight=False, style="dim")
    done = sum(row.state == "done" for row in planned)
    console.print(f"{done} of {len(planned)} steps are done; {len(planned) - done} would run", highlight=False)
    return 0
