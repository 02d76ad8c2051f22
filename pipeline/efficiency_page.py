"""Show the cost of a token as tables that fit 100 columns, with the accounting beneath."""

from __future__ import annotations

from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from model.config import AnyConfig, ModelConfig
from model.efficiency import GROUPS, PRECISIONS, cache, parts, state_bytes

UNITS = {"M": 2**20, "K": 2**10}
WIDTH = 100
LONG = 2**20
"""A length at which every kind of product and of cached vector occurs."""
COLUMNS = {
    "length": 6, "dense": 5, "experts": 7, "core": 6, "indexer": 7, "compr.": 6, "mHC": 4, "head": 4, "total": 6, "of V3.2": 7, "less": 5,
    "KV": 7, "of V3.2 ": 7, "less ": 5,
}  # fmt: skip
"""Titles and widths; a trailing blank tells equal titles apart."""
NOTES = (
    "FLOPs: two a multiply-add. The token is decoded at this context length, itself included, with everything before it cached; V3.2 in "
    "its absorbed form. Norms, rotations, softmaxes, gates, pooling and Sinkhorn's iterations are not counted; nor is MTP.",
    "Parameters: without MTP, V4's hyper-connections (mHC) apart; active: with the head, without the embedding and the experts that were "
    "not chosen.",
)


def show(models: dict[str, AnyConfig], measured: dict[str, Any], *, baseline: AnyConfig) -> None:
    """Print the tables.

    Args:
        models: configurations by name.
        measured: what `pipeline.efficiency.measure` returned for them.
        baseline: the released V3.2, whose accounting is shown too.
    """
    console = Console()
    (console if console.width >= WIDTH else Console(width=WIDTH)).print(page(models, measured, baseline=baseline))


def page(models: dict[str, AnyConfig], measured: dict[str, Any], *, baseline: AnyConfig) -> RenderableType:
    """Lay out one table a model, then what was counted and how."""
    shown: list[RenderableType] = [
        Text("FLOPs of a decoded token, FP8-equivalent, and KV cache by context length; beside the released V3.2", style="bold")
    ]
    for name, config in models.items():
        shown += [Text(), _title(name, config, measured["models"][name]), _model(measured["lengths"], measured["models"][name])]
    return Group(*shown, Text(), *_accounting(models, baseline))


def length_name(tokens: int) -> str:
    """Write a length as its reader counts: 4K, 1M, or the number itself."""
    for unit, size in UNITS.items():
        if tokens % size == 0:
            return f"{tokens // size}{unit}"
    return str(tokens)


def times_less(share: float) -> str:
    """Write a share of V3.2's as how many times less it is: 3.7x for 27 %, 0.5x for twice as much."""
    return f"{1 / share:.1f}x" if 1 / share < 1000 else f"{1 / share:.0f}x"


def _title(name: str, config: AnyConfig, found: dict[str, Any]) -> Text:
    total, active, mixing = (_count(found[f"params_{kind}"]) for kind in ("total", "active", "hyper_connections"))
    beside = f" (+{mixing} mHC)" if found["params_hyper_connections"] else ""
    return Text.assemble((name, "bold cyan"), f"   {total} parameters{beside}, {active} active   ", (_layers(config), "dim"))


def _count(number: int) -> str:
    return f"{number / 1e9:.1f}B" if number >= 1e9 else f"{number / 1e9:.2f}B" if number >= 1e7 else f"{number / 1e6:.2f}M"


def _layers(config: AnyConfig) -> str:
    if not isinstance(config, ModelConfig):
        return f"{config.num_hidden_layers} layers, MLA with DSA"
    ratios = config.compress_ratios[: config.num_hidden_layers]
    kinds = {"CSA": ratios.count(4), "HCA": ratios.count(128), "window only": ratios.count(0)}
    return f"{len(ratios)} layers: " + ", ".join(f"{count} {kind}" for kind, count in kinds.items() if count)


def _model(lengths: list[int], found: dict[str, Any]) -> Table:
    flop, flop_name = (1e9, "GFLOP") if max(found["flops_per_token"]) >= 1e9 else (1e6, "MFLOP")
    byte, byte_name = (1e6, "KV MB") if max(found["kv_bytes"]) >= 1e6 else (1e3, "KV kB")
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim")
    for title, width in COLUMNS.items():
        bold = title in ("total", "KV")
        shown = {"total": flop_name, "KV": byte_name}.get(title, title)
        table.add_column(shown, justify="right", min_width=width, style="bold" if bold else "", no_wrap=True)
    for i, length in enumerate(lengths):
        flops, stored = found["flops_vs_v32"][i], found["kv_vs_v32"][i]
        cells = [_number(found["flops_by_group"][group][i] / flop) for group in GROUPS]
        cells += [_number(found["flops_per_token"][i] / flop), f"{flops:.1%}", times_less(flops)]
        cells += [_number(found["kv_bytes"][i] / byte), f"{stored:.1%}", times_less(stored)]
        table.add_row(length_name(length), *cells)
    return table


def _number(value: float) -> str:
    return "-" if value == 0 else f"{value:.1f}" if value >= 0.05 else f"{value:.2f}"


def _accounting(models: dict[str, AnyConfig], baseline: AnyConfig) -> list[RenderableType]:
    """Spell out which product runs in which precision, what it counts, and how many bytes a cached vector has."""
    kinds: dict[str, list[AnyConfig]] = {
        "V4": [config for config in models.values() if isinstance(config, ModelConfig)],
        "V3.2": [baseline],
    }
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("precision")
    table.add_column("a FLOP counts", justify="right")
    kinds = {kind: configs for kind, configs in kinds.items() if configs}
    for kind in kinds:
        table.add_column(kind)
    for precision, weight in PRECISIONS.items():
        if any(cells := [_products(configs, precision) for configs in kinds.values()]):
            table.add_row(precision, f"{weight:g}", *cells)
    stored = [_stored(name, config) for name, config in models.items()]
    return [Text("Accounting", style="bold"), table, *(Text(note, style="dim") for note in (*NOTES, *stored))]


def _products(configs: list[AnyConfig], precision: str) -> str:
    """List the products of one precision by group."""
    found: dict[str, dict[str, None]] = {}
    for part in (part for config in configs for part in parts(config, LONG)):
        if part.precision == precision and part.macs:
            found.setdefault(part.group, {})[part.name] = None
    return "\n".join(f"{group}: {', '.join(names)}" for group, names in found.items())


def _stored(name: str, config: AnyConfig) -> str:
    sizes = ", ".join(f"{kind.name} {kind.bytes_each}" for kind in cache(config, LONG) if kind.vectors)
    states = state_bytes(config)
    beside = f"; beside them {states / 1e6:.3g} MB of fp32 compressor states at every length, not counted" if states else ""
    return f"KV bytes a vector of {name}: {sizes}{beside}."
