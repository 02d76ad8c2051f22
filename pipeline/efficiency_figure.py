"""Draw what a token costs against its position, and what its context's cache takes: the report's figure 1 for any models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from model.config import AnyConfig
from model.efficiency import flops_per_token, kv_bytes
from pipeline.efficiency_page import length_name, times_less
from pipeline.page import DOMAIN_COLOURS, INK, STYLE

POINTS = 256
"""Intervals of a curve; at a million tokens one every 4096."""
TITLES = {"v4_pro": "DeepSeek-V4-Pro", "v4_flash": "DeepSeek-V4-Flash", "v32": "DeepSeek-V3.2"}
COLOURS = {"v32": "#8a93a3", "v4_pro": "#3b6fd8", "v4_flash": "#12a37a"}
UNITS = {1e12: "T", 1e9: "G", 1e6: "M", 1e3: "k"}


def draw(models: dict[str, AnyConfig], *, baseline: AnyConfig, longest: int, path: Path) -> Path:
    """Draw two panels: FLOPs of a token against its position, bytes of cache against the length.

    Args:
        models: configurations by name.
        baseline: the released V3.2; at its end each curve says how many times it is below this one.
        longest: right end of both axes, tokens.
        path: of the PNG; its directory is made.

    Returns:
        `path`.
    """
    lengths = sorted({max(1, longest * i // POINTS) for i in range(POINTS + 1)})
    with rc_context(STYLE | {"font.size": 12}):
        figure = Figure(figsize=(13.5, 5.2), layout="constrained", facecolor="white")
        left, right = figure.subplots(1, 2, gridspec_kw={"wspace": 0.06})
        _panel(left, models, lengths, cost=flops_per_token, baseline=baseline)
        _panel(right, models, lengths, cost=kv_bytes, baseline=baseline)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=160)
    return path


def _panel(
    axes: Axes, models: dict[str, AnyConfig], lengths: list[int], *, cost: Callable[[AnyConfig, int], float], baseline: AnyConfig
) -> None:
    flops = cost is flops_per_token
    curves = {name: [cost(config, length) for length in lengths] for name, config in models.items()}
    highest = max(values[-1] for values in curves.values())
    scale, unit = next(((scale, unit) for scale, unit in UNITS.items() if highest >= scale), (1, ""))
    others = iter(DOMAIN_COLOURS[1:] * len(curves))
    colours = {name: COLOURS.get(name) or next(others) for name in curves}
    for name, values in curves.items():
        axes.plot(lengths, [value / scale for value in values], color=colours[name], linewidth=2.6, solid_capstyle="round", clip_on=False)
        axes.plot(lengths[-1], values[-1] / scale, "o", color=colours[name], markersize=6, clip_on=False)
    axes.set_ylim(0, highest / scale * 1.06)
    axes.set_xlim(0, lengths[-1])
    ticks = [lengths[-1] * i // 4 for i in range(5)]
    axes.set_xticks(ticks, ["0", *(length_name(tick) for tick in ticks[1:])])
    axes.tick_params(pad=6)
    axes.set_xlabel("position of the token" if flops else "tokens of the sequence")
    what = f"{unit}FLOPs a token, FP8-equivalent" if flops else f"KV cache, {unit}B"
    axes.set_title(what, loc="left", color=INK, fontsize=14, fontweight="bold", pad=14)
    ends = {name: values[-1] / scale for name, values in curves.items()}
    known = {} if "v32" in models else {"lower": "lower than V3.2", "smaller": "smaller than V3.2"}
    said = {name: f"{end:#.3g}".rstrip(".") + f" {unit}{'FLOPs' if flops else 'B'}" for name, end in ends.items()}
    for name, values in curves.items():
        share = values[-1] / cost(baseline, lengths[-1])
        if abs(share - 1) > 0.005:
            word = "lower" if flops else "smaller"
            said[name] = f"{times_less(share)} {known.get(word, word)}  ({said[name]})"
    _label_ends(axes, ends, colours, said)


def _label_ends(axes: Axes, ends: dict[str, float], colours: dict[str, str], said: dict[str, str]) -> None:
    """Write each curve's name and what is said of it right of its end, moved up where it would cover the one below."""
    lowest, top = axes.get_ylim()
    room = (top - lowest) * 0.15
    free, edge = lowest, axes.get_yaxis_transform()
    for name in sorted(ends, key=lambda name: ends[name]):
        place = max(ends[name], free)
        free = place + room
        axes.plot([1.012, 1.032], [ends[name], place], color=colours[name], linewidth=1, alpha=0.7, transform=edge, clip_on=False)
        for text, colour, shift, weight in ((TITLES.get(name, name), colours[name], 8, "bold"), (said[name], INK, -8, "normal")):
            axes.annotate(
                text, (1.04, place), (0, shift), xycoords=edge, textcoords="offset points", va="center", color=colour, fontweight=weight
            )
