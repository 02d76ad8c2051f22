"""Where the time of one supervised step goes: GPU and host time by phase, group and kernel, for `bench_grpo_gpu --profile`.

Phases are those of the host when it launched a kernel: the engine's forward and backward, DeepSpeed's part of the optimizer step (copies of
gradients, reduction, new weights), and the optimizer itself; at ZeRO 1 norm and clipping count as 'optimizer', as `runtime.clipping` runs
them when that begins. The profiler slows the host, so the step's seconds without it stand beside: alone, from an idle GPU to an idle GPU,
and in a chain of steps.
"""

from __future__ import annotations

import json
import re
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from runtime.batch import Batch
from runtime.spec import LossSpec

KERNELS = Path(__file__).resolve().parent.parent / "model/kernels"
PHASES = {"forward_backward": "forward, backward", "optim_step": "DeepSpeed's step", "Optimizer.step#HybridOptimizer.step": "optimizer"}
"""Ranges in the trace, the later inside the earlier where both hold: the engine's marks, and torch's own around every optimizer's step."""
CHAIN = 5
"""Steps that follow one another."""
ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
ON_HOST = ("cuda_runtime", "cuda_driver")
GROUPS = {
    "NCCL": r"nccl",
    "copies and fills": r"^Mem(cpy|set)",
    "grouped products": r"(?i)group.*(gemm|mm)|(gemm|mm).*group",
    "dense products": r"(?i)gemm|cutlass|nvjet|splitk|cublas",
    "element-wise of torch": r"at::|at_cuda_detail|cub::",
}
"""What kernels of others are called. Triton's have the names of the functions in `model/kernels`."""


@dataclass(frozen=True)
class Span:
    """One event of the trace: when, in microseconds, and what."""

    start: float
    length: float
    name: str
    phase: str


def profile_step(actor: Any, rows: Sequence[Batch], *, loss: LossSpec, lr: float) -> str:
    """Run a supervised step in a rank's process, some times without the profiler and twice with it; returns the tables."""
    alone = min(_seconds(actor.engine, rows, loss=loss, lr=lr) for _ in range(3))
    chained = _seconds(actor.engine, rows, loss=loss, lr=lr, steps=CHAIN) / CHAIN
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    for _ in range(2):  # the first step under a profiler pays for setting it up
        with profile(activities=activities) as profiler:
            profiled = _seconds(actor.engine, rows, loss=loss, lr=lr)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    head = (
        f"a step of {sum(len(row.tokens) for row in rows)} tokens: {alone * 1e3:.1f} ms, in a chain {chained * 1e3:.1f} ms, "
        f"with the profiler {profiled * 1e3:.1f} ms"
    )
    return "\n".join([head, *tables(events)])


def _seconds(engine: Any, rows: Sequence[Batch], *, loss: LossSpec, lr: float, steps: int = 1) -> float:
    """Return the seconds that steps one after the other take, from an idle GPU to an idle GPU."""
    began = time.perf_counter()
    for _ in range(steps):
        engine.train_step(rows, loss, float(sum(row.target_count for row in rows)), lr=lr, router_bias_speed=1e-3)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def tables(events: Iterable[Mapping[str, Any]], *, top: int = 30) -> list[str]:
    """Lay out what a Chrome trace of torch's profiler says.

    Args:
        events: its `traceEvents`; times in microseconds. A kernel and the call that launched it carry one correlation number.
        top: kernels to list.
    """
    timed = [event for event in events if event.get("ph") == "X"]
    ranges = [(e["ts"], e["ts"] + e["dur"], PHASES[e["name"]]) for e in timed if e["name"] in PHASES and e.get("cat") == "user_annotation"]
    host = [_span(e, e["ts"], ranges=ranges) for e in timed if e.get("cat") in ON_HOST]
    launched = {e["args"]["correlation"]: e["ts"] for e in timed if e.get("cat") in ON_HOST and "correlation" in e.get("args", {})}
    gpu = [_span(e, launched.get(e["args"].get("correlation"), e["ts"]), ranges=ranges) for e in timed if e.get("cat") in ON_GPU]
    gpu.sort(key=lambda span: span.start)
    calls = host or [_span(e, e["ts"], ranges=ranges) for e in timed if e.get("cat") == "cpu_op"]
    return [*_by_phase(gpu, ranges), *_by_group(gpu), *_most("kernel", gpu, top=top), *_most("host call", calls, top=15), *_gaps(gpu)]


def _span(event: Mapping[str, Any], launched: float, *, ranges: Sequence[tuple[float, float, str]]) -> Span:
    """Read an event; its phase is the shortest range that was open when it was launched."""
    around = [(end - start, phase) for start, end, phase in ranges if start <= launched < end]
    return Span(event["ts"], event["dur"], event["name"], min(around)[1] if around else "outside")


def _idle_before(gpu: Sequence[Span]) -> list[float]:
    """Return how long the GPU had nothing to do before each of its spans, which are in order of their starts."""
    idle, until = [], gpu[0].start if gpu else 0.0
    for span in gpu:
        idle.append(max(0.0, span.start - until))
        until = max(until, span.start + span.length)
    return idle


def _by_phase(gpu: Sequence[Span], ranges: Sequence[tuple[float, float, str]]) -> list[str]:
    busy: Counter[str] = Counter()
    idle: Counter[str] = Counter()
    host: Counter[str] = Counter()
    for span, wait in zip(gpu, _idle_before(gpu), strict=True):
        busy[span.phase] += span.length
        idle[span.phase] += wait
    for start, end, phase in ranges:
        host[phase] += end - start
    host["DeepSpeed's step"] -= host["optimizer"]  # which runs inside it
    count = Counter(span.phase for span in gpu)
    lines = [f"{'phase':24}{'GPU busy ms':>12}{'idle before ms':>16}{'launches':>10}{'host ms':>10}"]
    for phase in [*PHASES.values(), "outside"]:
        lines.append(f"{phase:24}{busy[phase] / 1e3:12.2f}{idle[phase] / 1e3:16.2f}{count[phase]:10}{host[phase] / 1e3:10.2f}")
    lines.append(f"{'all':24}{busy.total() / 1e3:12.2f}{idle.total() / 1e3:16.2f}{count.total():10}")
    return lines


def _groups() -> dict[str, str]:
    """Return the folder of `model/kernels` that holds each Triton function."""
    functions = re.compile(r"^@triton\.jit\ndef (\w+)", re.MULTILINE)
    return {name: path.parent.name for path in sorted(KERNELS.glob("*/*.py")) for name in functions.findall(path.read_text())}


def _by_group(gpu: Sequence[Span]) -> list[str]:
    ours, total = _groups(), max(1e-9, sum(span.length for span in gpu))
    spent: dict[str, Counter[str]] = {}
    for span in gpu:
        group = ours.get(span.name) or next((name for name, words in GROUPS.items() if re.search(words, span.name)), "other")
        spent.setdefault(group, Counter())[span.phase] += span.length
    lines = [f"{'group, ms':24}{'all':>10}{'share':>8}" + "".join(f"{phase:>20}" for phase in PHASES.values())]
    for group, by_phase in sorted(spent.items(), key=lambda item: -item[1].total()):
        columns = "".join(f"{by_phase[phase] / 1e3:20.2f}" for phase in PHASES.values())
        lines.append(f"{group:24}{by_phase.total() / 1e3:10.2f}{by_phase.total() / total:8.1%}{columns}")
    return lines


def _most(what: str, spans: Sequence[Span], *, top: int) -> list[str]:
    """List the names that took longest, each phase on its own."""
    spent: Counter[tuple[str, str]] = Counter()
    count: Counter[tuple[str, str]] = Counter()
    for span in spans:
        spent[span.name, span.phase] += span.length
        count[span.name, span.phase] += 1
    lines = [f"{'ms':>9}{'count':>8}  {'phase':20}{what}"]
    return lines + [f"{ms / 1e3:9.2f}{count[name, phase]:8}  {phase:20}{name[:110]}" for (name, phase), ms in spent.most_common(top)]


def _gaps(gpu: Sequence[Span], top: int = 10) -> list[str]:
    """List the longest times without work for the GPU, and what ended them."""
    longest = sorted(zip(_idle_before(gpu), range(len(gpu)), strict=True), reverse=True)[:top]
    return [f"{'idle ms':>9}  {'phase':20}before"] + [f"{wait / 1e3:9.2f}  {gpu[i].phase:20}{gpu[i].name[:110]}" for wait, i in longest]
