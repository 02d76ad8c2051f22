"""The clock of the GPU's GRPO benchmark and the table it ends with, for `bench_grpo_gpu`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median

import torch
from grpo_setting import Setting

from model.config import ModelConfig
from model.efficiency import parts

H200_BF16 = 989e12
"""FLOP/s, dense bf16. Source: NVIDIA H200 data sheet (half of the figure with sparsity)."""


class Clock:
    """Seconds, and most bytes allocated on the GPU, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}
        self.peaks: dict[str, int] = {}

    def measure(self, name: str, run: Callable[[], int], *, counts: bool) -> None:
        """Time `run`, which returns the most bytes allocated, 0 where they are read later."""
        began = time.perf_counter()
        peak = run()
        self.note(name, time.perf_counter() - began, peak, counts=counts)

    def note(self, name: str, seconds: float, peak: int, *, counts: bool) -> None:
        """Keep what was measured."""
        print(f"{name} {seconds:.3f} s{'' if counts else ' (warm-up)'}", flush=True)
        if counts:
            self.seconds.setdefault(name, []).append(seconds)
            self.peaks[name] = max(peak, self.peaks.get(name, 0))


def flops_a_token(config: ModelConfig, length: int) -> tuple[int, float]:
    """Count the training FLOPs of a token: 6 an active parameter, and that plus core attention's products over a sample of `length`."""
    dense = 6 * sum(part.active for part in parts(config, 1) if part.params and part.macs)
    attention = [sum(part.macs for part in parts(config, t) if part.name == "keys and values") for t in range(1, length + 1)]
    return dense, dense + 6 * sum(attention) / length


def measured_product() -> float:
    """Return the FLOP/s of a bf16 product of 8192^3 after half a second of it."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for event, repeats in ((start, 200), (end, 100)):
        for _ in range(repeats):
            a @ b.T
        event.record()
    torch.cuda.synchronize()
    return 100 * 2 * 8192**3 / (start.elapsed_time(end) * 1e-3)


def report(clock: Clock, setting: Setting, shares: Sequence[tuple[float, float, float]], *, mismatch_nats: float) -> str:
    """Lay out medians, tokens a second, MFU, what our step consists of, and the ratio to TRL.

    Args:
        clock: what was measured.
        setting: what of.
        shares: seconds that each of our steps generated, graded and trained.
        mismatch_nats: the largest KL between what was sampled from and what was trained.
    """
    product = measured_product() if setting.device == "cuda" else float("nan")
    dense, whole = flops_a_token(setting.config, setting.length)
    size = sum(p.params for p in parts(setting.config, 1))
    lines = [
        f"{size / 1e6:.0f}M parameters, {dense / 6e6:.0f}M active in products; "
        f"a step: {setting.prompts} prompts x {setting.samples} samples x ({setting.prompt_tokens} + {setting.new_tokens}) tokens, "
        f"{setting.rows} decoded at once, rows of {setting.row_tokens}; supervised samples of {setting.length}; "
        f"measured product {product / 1e12:.0f} TFLOP/s",
        f"{'':24}{'median s':>10}{'min s':>9}{'max s':>9}{'tokens/s':>11}{'MFU':>8}{'+attn':>8}{'of prod.':>10}{'peak GiB':>10}{'n':>4}",
    ]
    middle = {name: median(seconds) for name, seconds in clock.seconds.items()}
    for name, seconds in clock.seconds.items():
        tokens = int(name.split()[-1]) if name.startswith("supervised") else setting.sampled
        rate = tokens / middle[name]
        mfu = f"{rate * dense / H200_BF16:8.1%}{rate * whole / H200_BF16:8.1%}{rate * dense / product:10.1%}"
        blank = " " * 26
        lines.append(
            f"{name:24}{middle[name]:10.3f}{min(seconds):9.3f}{max(seconds):9.3f}{rate:11.0f}"
            f"{mfu if name.startswith('supervised') else blank}{clock.peaks[name] / 2**30:10.1f}{len(seconds):4}"
        )
    generate, grade, train = (median(column) for column in zip(*shares, strict=True))
    total = generate + grade + train
    lines.append(
        f"our step: generate {generate:.3f} s ({generate / total:.0%}), grade {grade:.3f} s ({grade / total:.0%}), train {train:.3f} s "
        f"({train / total:.0%}); largest mismatch KL {mismatch_nats:.2g} nats"
    )
    if "TRL step" in middle:
        lines.append(f"GRPO step {middle['TRL step'] / middle['our step']:.1f} x as fast as TRL's")
    return "\n".join(lines)
