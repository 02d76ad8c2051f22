"""Show the steps of a run while they run: a live table on a terminal, a plain line every ten seconds elsewhere."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.live import Live as RichLive
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from runtime.tracking import PROGRESS

if TYPE_CHECKING:  # both draw in what `plan` must not wait for; only types are named here
    from pipeline.execute import Outcome, Settings
    from runtime.cluster import ClusterInfo

PLAIN_EVERY_S = 10.0
STYLES = {"waiting": "dim", "running": "bold cyan", "done": "green", "reused": "blue", "failed": "bold red"}


@dataclass
class Row:
    """One step as the user sees it."""

    workdir: Path
    status: str = "waiting"
    started: float = 0.0
    elapsed_s: float = 0.0
    result: str = ""


class Live:
    """What the user sees of a run, from its first line to its report."""

    def __init__(self, settings: Settings, workdirs: Mapping[str, Path], *, stage: str, console: Console | None = None) -> None:
        """Prepare the view of a run.

        Args:
            settings: of the run.
            workdirs: where each step reports its progress, in the order to show.
            stage: what the run makes.
            console: where to write; standard output when left out.
        """
        self.settings, self.stage = settings, stage
        self.rows = {name: Row(workdir) for name, workdir in workdirs.items()}
        self.console = console or Console()
        self._rich: RichLive | None = None
        self._note, self._last_plain = "", time.monotonic()

    def __enter__(self) -> Live:
        self._header()
        if self.console.is_terminal:
            self._rich = RichLive(self._table(), console=self.console, refresh_per_second=4, auto_refresh=False)
            self._rich.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None) -> None:
        self._note = ""
        if self._rich is not None:
            self._rich.update(self._table(), refresh=True)
            self._rich.stop()
            self._rich = None

    def note(self, text: str) -> None:
        """Say what the run is busy with outside its steps."""
        self._note = text
        self._say(text)

    def cluster_started(self, info: ClusterInfo, *, width: int) -> None:
        """Say where Ray's dashboard is, how to get into it, and how many steps run side by side."""
        self._note = ""
        self.console.print(f"[dim]dashboard[/dim]  {info.dashboard_url or 'off'}", highlight=False)
        if info.dashboard_url and info.token_command:
            self.console.print(f"           [dim]its token:[/dim] {info.token_command}", highlight=False, soft_wrap=True)
        resources = f"{info.cpus:g} CPUs, {info.gpus:g} GPUs: up to {width} steps side by side"
        self.console.print(f"[dim]resources[/dim]  {resources}", highlight=False)

    def started(self, name: str) -> None:
        """Show a step as running."""
        row = self.rows[name]
        row.status, row.started = "running", time.time()
        self._say(f"{name}: started, log {self.settings.run_dir / 'logs' / f'{name}.log'}")

    def ended(self, name: str, outcome: Outcome) -> None:
        """Show a step as done or reused, with its pass@1."""
        row = self.rows[name]
        row.status, row.elapsed_s = outcome.status, outcome.elapsed_s
        row.result = "  ".join(f"{domain} {found['pass@1']:.0%}" for domain, found in outcome.summary.get("evaluation", {}).items())
        waited = ", made by another run meanwhile" if outcome.waited else ""
        self._say(f"{name}: {outcome.status}{waited} ({duration(outcome.elapsed_s)})" + (f", pass@1 {row.result}" if row.result else ""))

    def failed(self, name: str) -> None:
        """Show a step as failed."""
        self.rows[name].status = "failed"
        self._say(f"{name}: failed, log {self.settings.run_dir / 'logs' / f'{name}.log'}")

    def refresh(self) -> None:
        """Draw again, or on no terminal write a line if ten seconds have passed."""
        if self._rich is not None:
            self._rich.update(self._table(), refresh=True)
        elif time.monotonic() - self._last_plain >= PLAIN_EVERY_S:
            self._last_plain = time.monotonic()
            for name, row in self.rows.items():
                if row.status == "running":
                    print(f"{name}: {_plain(read_progress(row.workdir))}", file=self.console.file, flush=True)

    def close_with(self, closing: RenderableType) -> None:
        """Print the report's table and where the report is, last."""
        self.console.print(closing)

    def _say(self, text: str) -> None:
        if self._rich is None:
            print(text, file=self.console.file, flush=True)
        else:
            self._rich.update(self._table(), refresh=True)

    def _header(self) -> None:
        mode = self.settings.tracking.wandb
        wandb = "off" if mode == "off" else f"{self.settings.run_dir / 'wandb'} ({mode})"
        rows = {
            "run": f"{self.settings.run} (stage {self.stage}, seed {self.settings.seed})",
            "directory": str(self.settings.run_dir),
            "W&B": wandb,
            "kernels": _kernels(self.settings),
        }
        for name, value in rows.items():
            self.console.print(f"[dim]{name:<9}[/dim]  {value}", highlight=False, soft_wrap=True)

    def _table(self) -> RenderableType:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
        for title, justify in (
            ("step", "left"),
            ("", "left"),
            ("progress", "left"),
            ("", "right"),
            ("left", "right"),
            ("", "left"),
            ("tokens/s", "right"),
        ):
            table.add_column(title, justify="right" if justify == "right" else "left", no_wrap=True)
        for name, row in self.rows.items():
            style = STYLES[row.status]
            state = read_progress(row.workdir) if row.status == "running" else None
            table.add_row(Text(name, style=style), Text(row.status, style=style), *_cells(row, state))
        return Group(Text(), table, Text(self._note, style="dim"))


def _cells(row: Row, state: dict[str, Any] | None) -> list[RenderableType]:
    if row.status in ("done", "reused"):
        return [ProgressBar(total=1, completed=1, width=24), "", duration(row.elapsed_s), Text(row.result), ""]
    if state is None:
        pulse = row.status == "running"
        return [ProgressBar(total=1, completed=0, width=24, pulse=pulse), "", "", "starting" if pulse else "", ""]
    metrics = state["metrics"]
    left = time_left(state, time.time())
    speed = f"{metrics['perf/tokens_per_s']:,.0f}" if "perf/tokens_per_s" in metrics else ""
    said = "  ".join(part for part in (state["note"], headline(metrics)) if part)
    bar = ProgressBar(total=max(1, state["total"]), completed=state["done"], width=24)
    return [bar, f"{state['done']}/{state['total']}", duration(left) if left is not None else "", said, speed]


def _kernels(settings: Settings) -> str:
    chosen, gpu = settings.engine.kernels, settings.cluster.gpus_per_rank > 0
    if chosen == "triton" or (chosen == "auto" and gpu):
        return "triton"
    return "reference (plain PyTorch)" if gpu else "reference (plain PyTorch), decoding compiled (numba) where the model is a V4 in fp32"


def _plain(state: dict[str, Any] | None) -> str:
    if state is None:
        return "starting"
    left, metrics = time_left(state, time.time()), state["metrics"]
    parts = [f"{state['note'] or 'step'} {state['done']}/{state['total']}"]
    parts += [f"{duration(left)} left"] if left is not None else []
    parts += [headline(metrics)] if headline(metrics) else []
    parts += [f"{metrics['perf/tokens_per_s']:,.0f} tokens/s"] if "perf/tokens_per_s" in metrics else []
    return ", ".join(parts)


def headline(metrics: Mapping[str, float]) -> str:
    """Pick the number that says how a step is doing: the reward, the reverse KL, or a loss."""
    for name, label in (("reward/mean", "reward"), ("distill/reverse_kl", "reverse KL")):
        if name in metrics:
            return f"{label} {metrics[name]:.3f}"
    loss = next((name for name in metrics if name == "loss" or name.endswith("/loss")), None)
    return f"loss {metrics[loss]:.3f}" if loss else ""


def read_progress(workdir: Path) -> dict[str, Any] | None:
    """Read what a step last said of itself; None before its first word and after its commit."""
    try:
        return json.loads((workdir / PROGRESS).read_text())
    except FileNotFoundError:
        return None


def time_left(state: Mapping[str, Any], now: float) -> float | None:
    """Estimate the seconds that a phase has left, from its speed so far; None before it moved."""
    moved = state["done"] - state["since_done"]
    if moved <= 0:
        return None
    pace_s = (state["now"] - state["since"]) / moved
    return max(0.0, (state["total"] - state["done"]) * pace_s - (now - state["now"]))


def duration(seconds: float) -> str:
    """Write seconds as `8 s`, `3 min 05 s` or `2 h 10 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
