"""Draw `report.html`: one self-contained file, plots inside, fit for a slide."""

from __future__ import annotations

import html
import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipeline.live import duration
from pipeline.shares import ACTIVITIES
from runtime.tracking import METRICS, read_metrics

if TYPE_CHECKING:  # report draws this page in
    from pipeline.report import Run

INK, MUTED, GRID = "#1c2330", "#6b7485", "#e6e9ef"
LEVEL_COLOURS = {"base": "#c3cad6", "sft": "#8fb4f5", "expert": "#3b6fd8", "student": "#12a37a"}
LEVEL_NAMES = {"base": "base", "sft": "after SFT", "expert": "expert (GRPO)", "student": "student"}
DOMAIN_COLOURS = ("#3b6fd8", "#d9822b", "#8a4fd3", "#12a37a", "#c2416b", "#5b7083")
Draw = Callable[[Axes], None]
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "grid.color": GRID,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
}

CSS = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #f5f7fa; color: #1c2330; font: 15px/1.5 system-ui, -apple-system, "DejaVu Sans", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 30px; letter-spacing: -0.02em; margin: 0 0 4px; }
h2 { font-size: 16px; margin: 0 0 12px; }
.sub { color: #6b7485; margin: 0 0 28px; }
.grid { display: grid; gap: 16px; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); margin-bottom: 16px; }
.two { grid-template-columns: repeat(auto-fit, minmax(440px, 1fr)); }
.card { background: #fff; border: 1px solid #e6e9ef; border-radius: 14px; padding: 20px; }
.big { font-size: 23px; white-space: nowrap; font-weight: 650; letter-spacing: -0.02em; line-height: 1.15; }
.label { color: #6b7485; font-size: 13px; }
.good { color: #0f8a67; }
.wide { margin-bottom: 16px; }
svg { width: 100%; height: auto; display: block; }
svg text { font-family: system-ui, -apple-system, "DejaVu Sans", sans-serif !important; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { text-align: right; color: #6b7485; font-weight: 500; font-size: 13px; padding: 6px 10px; border-bottom: 1px solid #e6e9ef; }
td { text-align: right; padding: 8px 10px; border-bottom: 1px solid #f0f2f6; }
tr:last-child td { border-bottom: 0; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
td small { color: #6b7485; font-weight: 400; white-space: nowrap; }
code { font: 12.5px ui-monospace, "SF Mono", Menlo, "DejaVu Sans Mono", monospace; color: #6b7485; }
"""


def page(run: Run, report: dict[str, Any]) -> str:
    """Return the whole page.

    Args:
        run: what the run's directory says of it.
        report: what `report.json` holds.
    """
    plots = [_card(title, _svg([draw])) for title, draw in _learning(run, report)]
    times = {name: step["elapsed_s"] for name, step in report["steps"].items()}
    title = html.escape(
        f"{len(report['domains'])} experts, one student" if report["mean_recovery"] is not None else f"Stage {report['stage']}"
    )
    body = [
        f"<h1>{title}</h1>",
        f'<p class="sub">run <b>{html.escape(report["run"])}</b> · stage {report["stage"]} · {_model(run.config)}</p>',
        _headline(report),
        _card("pass@1 on held-out prompts, 95 % intervals", _svg([lambda axes: _bars(axes, report["domains"])], size=(10.4, 3.4)), "wide"),
        f'<div class="card wide">{_domain_table(report["domains"])}</div>',
        f'<div class="grid two">{"".join(plots)}</div>' if plots else "",
        _card("Time per step", _svg([lambda axes: _times(axes, times)], size=(10.4, 0.32 * max(3, len(times)) + 0.5)), "wide"),
        f'<div class="card">{_step_table(report["steps"])}</div>',
    ]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title><style>{CSS}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body><main>{"".join(body)}</main></body></html>\n'


def picture(run: Run, report: dict[str, Any]) -> str:
    """Return bars and learning curves as one SVG, for a slide or a README; its text is drawn as paths."""
    panels: list[tuple[str, Draw]] = [("pass@1 on held-out prompts", lambda axes: _bars(axes, report["domains"])), *_learning(run, report)]

    def titled(title: str, draw: Draw) -> Draw:
        def drawn(axes: Axes) -> None:
            draw(axes)
            axes.set_title(title, loc="left", fontsize=11, pad=22)

        return drawn

    return _svg([titled(title, draw) for title, draw in panels], size=(5.2 * len(panels), 3.6), background="white", text="path")


def _learning(run: Run, report: dict[str, Any]) -> list[tuple[str, Draw]]:
    """List the learning curves that a run has, with their titles."""
    rewards = {name: _series(run, f"grpo-{name}", "reward/mean") for name in report["domains"]}
    kl = _series(run, "distill", "distill/reverse_kl")
    found: list[tuple[str, Draw]] = []
    if any(rewards.values()):
        found.append(("Reward while GRPO cultivates each expert", lambda axes: _curves(axes, rewards, "mean reward")))
    if kl:
        found.append(("Reverse KL to the teachers while distilling", lambda axes: _curves(axes, {"student": kl}, "nats a token")))
    return found


def _model(config: dict[str, Any]) -> str:
    model = config["model"]
    return (
        f"{model['num_hidden_layers']} layers × {model['hidden_size']}, {model['n_routed_experts']} routed experts · seed {config['seed']}"
    )


def _headline(report: dict[str, Any]) -> str:
    cards = []
    if report["mean_recovery"] is not None:
        cards.append(("mean recovery: (student − base) / (expert − base)", f'<span class="good">{report["mean_recovery"]:.1%}</span>'))
    for level, label in (("base", "base, mean pass@1"), ("expert", "experts, mean pass@1"), ("student", "student, mean pass@1")):
        found = [domain[level]["pass@1"] for domain in report["domains"].values() if level in domain]
        if found:
            cards.append((label, f"{sum(found) / len(found):.1%}"))
    cards += [("wall clock", duration(report["elapsed_s"])), ("peak memory, all processes", f"{report['peak_rss_gib']:.2f} GiB")]
    drawn = (f'<div class="card"><div class="big">{value}</div><div class="label">{label}</div></div>' for label, value in cards)
    return f'<div class="grid">{"".join(drawn)}</div>'


def _card(title: str, content: str, kind: str = "") -> str:
    return f'<section class="card {kind}"><h2>{html.escape(title)}</h2>{content}</section>'


def _series(run: Run, step: str, metric: str) -> list[tuple[int, float]]:
    path = run.path / "artifacts" / step / METRICS
    lines = read_metrics(path) if path.is_file() else []
    return [(line["step"], line[metric]) for line in lines if line.get(metric) is not None]


def _svg(panels: Sequence[Draw], *, size: tuple[float, float] = (5.6, 3.2), background: str = "none", text: str = "none") -> str:
    with rc_context(STYLE | {"svg.fonttype": text}):
        figure = Figure(figsize=size, layout="constrained", facecolor=background)
        widths = [1.4] + [1.0] * (len(panels) - 1)
        for axes, draw in zip(figure.subplots(1, len(panels), squeeze=False, width_ratios=widths)[0], panels, strict=True):
            axes.set_facecolor("none")
            draw(axes)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    drawn = buffer.getvalue()
    return drawn[drawn.index("<svg") :]


def _bars(axes: Axes, domains: dict[str, Any]) -> None:
    levels = [level for level in LEVEL_COLOURS if any(level in found for found in domains.values())]
    width = 0.8 / max(1, len(levels))
    for number, level in enumerate(levels):
        places = [i + (number - (len(levels) - 1) / 2) * width for i, found in enumerate(domains.values()) if level in found]
        found = [domain[level] for domain in domains.values() if level in domain]
        heights = [f["pass@1"] for f in found]
        margins = [[max(0.0, f["pass@1"] - f["ci95"][0]) for f in found], [max(0.0, f["ci95"][1] - f["pass@1"]) for f in found]]
        axes.bar(places, heights, width * 0.9, color=LEVEL_COLOURS[level], label=LEVEL_NAMES[level])
        axes.errorbar(places, heights, yerr=margins, fmt="none", ecolor=INK, elinewidth=0.9, capsize=2.5, alpha=0.55)
        for place, f in zip(places, found, strict=True):
            axes.annotate(f"{f['pass@1']:.0%}", (place, f["ci95"][1]), (0, 3), textcoords="offset points", ha="center", fontsize=9)
    axes.set_xticks(range(len(domains)), list(domains))
    axes.tick_params(axis="x", labelcolor=INK, labelsize=11)
    axes.grid(axis="x", visible=False)
    axes.set_ylim(0, 1.16)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1.0], ["0%", "25%", "50%", "75%", "100%"])
    axes.legend(loc="upper center", ncols=len(levels), bbox_to_anchor=(0.5, 1.16), handlelength=1.0, handleheight=1.0)


def _curves(axes: Axes, curves: dict[str, list[tuple[int, float]]], label: str) -> None:
    for colour, (name, points) in zip(DOMAIN_COLOURS * (len(curves) // len(DOMAIN_COLOURS) + 1), curves.items(), strict=False):
        if points:
            steps, values = zip(*points, strict=True)
            smooth = _smooth(values)
            axes.plot(steps, values, color=colour, alpha=0.22, linewidth=1)
            axes.plot(steps, smooth, color=colour, linewidth=2, label=name)
            axes.annotate(
                f"{smooth[-1]:.2f}", (steps[-1], smooth[-1]), (4, 0), textcoords="offset points", va="center", color=colour, fontsize=9
            )
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.set_ylim(bottom=0)
    axes.margins(x=0.02)
    if len(curves) > 1:
        axes.legend(loc="best", handlelength=1.2)


def _smooth(values: Sequence[float], weight: float = 0.6) -> list[float]:
    """Exponential moving average, unbiased at its start."""
    smooth, total, mass = [], 0.0, 0.0
    for value in values:
        total, mass = weight * total + (1 - weight) * value, weight * mass + (1 - weight)
        smooth.append(total / mass)
    return smooth


def _times(axes: Axes, times: dict[str, float]) -> None:
    names = list(times)
    axes.barh(names, list(times.values()), height=0.62, color="#8fb4f5")
    for name, seconds in times.items():
        axes.annotate(duration(seconds), (seconds, name), (4, 0), textcoords="offset points", va="center", fontsize=9)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("seconds")
    axes.margins(x=0.08)


def _domain_table(domains: dict[str, Any]) -> str:
    rows = []
    for name, found in domains.items():
        cells = [_with_interval(found[level]["pass@1"], found[level]["ci95"]) if level in found else "–" for level in LEVEL_COLOURS]
        gain = _with_interval(found["grpo_gain"], found["grpo_gain_ci95"], "+") if "grpo_gain" in found else "–"
        recovery = _with_interval(found["recovery"], found["recovery_ci95"]) if found.get("recovery") is not None else "–"
        count = next((found[level]["n"] for level in LEVEL_COLOURS if level in found), 0)
        rows.append([f"<b>{html.escape(name)}</b>", str(count), *cells, gain, f'<b class="good">{recovery}</b>'])
    return _table(["domain", "prompts", *LEVEL_NAMES.values(), "GRPO gain", "recovery"], rows)


def _step_table(steps: dict[str, Any]) -> str:
    rows = []
    for name, step in steps.items():
        memory = f"{step['peak_memory_gib']:.2f} GiB" if "peak_memory_gib" in step else "–"
        artifact = f"<code>{html.escape(step['artifact'])}</code>"
        shares = [f"{step['time_s'][each] / step['elapsed_s']:.0%}" if "time_s" in step else "–" for each in ACTIVITIES]
        first = [f"<b>{html.escape(name)}</b>", step["status"], duration(step["elapsed_s"]), *shares]
        rows.append([*first, f"{step['tokens']:,}", memory, artifact])
    return _table(["step", "status", "time", "generating", "grading", "training", "tokens", "peak memory", "artifact"], rows)


def _with_interval(value: float, interval: list[float] | None, sign: str = "") -> str:
    small = f" <small>[{interval[0]:.1%}, {interval[1]:.1%}]</small>" if interval else ""
    return f"{value:{sign}.1%}{small}"


def _table(titles: list[str], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{title}</th>" for title in titles)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
