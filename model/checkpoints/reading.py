"""Fill a model from a checkpoint's files: everything is checked before anything is allocated, then read a window at a time."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from model.checkpoints import formats
from model.checkpoints.files import Entry, list_tensors, read
from model.checkpoints.formats import Kept, Stored, decode, nan_scales, part_key, scale_name
from model.checkpoints.layouts import FAMILIES, Family, Slot, detect, slots
from model.config import AnyConfig, ModelConfig
from model.quant.fp8 import WEIGHT_BLOCK
from model.transformer import Transformer

logger = logging.getLogger(__name__)

MOST_PROBLEMS = 50
"""Lines of a message; the rest is counted."""


class Plan(NamedTuple):
    """What fills what.

    Attributes:
        entries: everything in the files, by name.
        slots: the tensors that fill the model, by name in the files.
        stored: in which format each of them is stored, and its scales.
        shell: the model on the meta device.
        official: whether the files have the release's layout.
    """

    entries: dict[str, Entry]
    slots: dict[str, Slot]
    stored: dict[str, Stored]
    shell: Transformer
    official: bool


def plan(path: Path, config: AnyConfig) -> Plan:
    """Check all of a checkpoint's files against the model they are to fill; reads headers, scales and routing tables only.

    Args:
        path: directory of the checkpoint.
        config: of the model.

    Raises:
        ValueError: files are missing or damaged, tensors missing, unexpected or misshapen, scales not numbers; all of a kind at once, with
            files and what was expected.
        FileNotFoundError: there are no files of tensors.
    """
    family, entries = FAMILIES[config.model_type], list_tensors(path)
    shell = _shell(config)
    layout = detect(family, _shapes(shell), entries)
    expected = slots(layout, _shapes(shell))
    if isinstance(config, ModelConfig) and config.num_nextn_predict_layers and _comes_without_mtp(expected, entries):
        kept = config.compress_ratios[: config.num_hidden_layers]
        shell = _shell(replace(config, num_nextn_predict_layers=0, compress_ratios=kept))
        expected = slots(layout, _shapes(shell))
    entries = {name: entry for name, entry in entries.items() if not _skipped(family, config, name)}
    integers = {name for name, value in shell.state_dict().items() if not value.dtype.is_floating_point}
    _refuse(path, _missing(path, expected, entries) + _misfits(expected, entries, integers))
    stored, problems = _read_scales(expected, entries)
    _refuse(path, problems + _wrong_tables(config, expected, entries))
    return Plan(entries, expected, stored, shell, layout.name == "official")


def fill(plan: Plan, *, dtype: torch.dtype | None, device: torch.device) -> Transformer:
    """Allocate the model and read it.

    Args:
        plan: what fills what.
        dtype: of everything but the parameters that the release keeps in fp32, which stay so; None for the narrowest that loses nothing.
        device: where the model is to be.
    """
    model, family = plan.shell, FAMILIES[plan.shell.config.model_type]
    dtype = dtype or _narrowest(plan, family)
    state: dict[str, Tensor] = {}
    opened: list[Path] = []
    for name, shape in model.state_dict().items():
        own = shape.dtype if not shape.dtype.is_floating_point else torch.float32 if family.format(name) == "fp32" else dtype
        state[name] = torch.empty(shape.shape, dtype=own, device=device)
    for name, first, rows in read(plan.entries, plan.slots, whole=lambda name: plan.stored[name].scales is not None):
        slot, how = plan.slots[name], plan.stored[name]
        if (file := plan.entries[name].file) not in opened:
            opened.append(file)
            logger.info("reading %s (%d of %d)", file.name, len(opened), len({entry.file for entry in plan.entries.values()}))
        for start, values in _decoded(rows.to(device) if how.scales is not None else rows, how, dtype):
            for part in slot.parts:
                target = state[part.target] if part.expert is None else state[part.target][part.expert]
                source = values if part.rows is None else values[:, slice(*part.rows)]
                target[first + start : first + start + len(source)].copy_(source)
    model.load_state_dict(state, assign=True)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:  # not saved: the routers' counts, which begin at zero
                assert name == "load"
                module.register_buffer(name, torch.zeros(buffer.shape, device=device), persistent=False)
    formats.LOADED[model] = _kept(plan)
    return model


def _decoded(stored: Tensor, how: Stored, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """Yield first row and values of a stored tensor; a quantised one some blocks at a time, which on a CPU stay in the cache."""
    if how.scales is None:
        yield 0, stored
        return
    height = stored.shape[0] if stored.device.type != "cpu" else WEIGHT_BLOCK[0]
    scale_rows = height // WEIGHT_BLOCK[0] if how.format == "fp8" else height
    for number, start in enumerate(range(0, stored.shape[0], height)):
        scales = how.scales[number * scale_rows : (number + 1) * scale_rows] if height < stored.shape[0] else how.scales
        yield start, decode(stored[start : start + height], Stored(how.format, scales), dtype=dtype)


def _narrowest(plan: Plan, family: Family) -> torch.dtype:
    """Find the dtype that holds everything exactly but what stays in fp32 anyway."""
    targets = {slot.parts[0].target for name, slot in plan.slots.items() if plan.stored[name].format in ("fp32", "fp16")}
    return torch.float32 if any(family.format(target) != "fp32" for target in targets) else torch.bfloat16


def _kept(plan: Plan) -> Kept:
    """Remember how each tensor was stored, of other layouts than the release's only what was quantised.

    Scales that ue8m0 cannot hold are not kept: saving makes new ones.
    """
    kept: Kept = {}
    for name, how in plan.stored.items():
        if not plan.official and how.scales is None:
            continue
        scales = how.scales if how.scales is None else formats.powers_of_two(how.scales)
        kept |= {part_key(part): Stored(how.format, scales) for part in plan.slots[name].parts}
    return kept


def _shell(config: AnyConfig) -> Transformer:
    """Build a model without values."""
    with torch.device("meta"), _WithoutValues():
        return Transformer(config)


class _WithoutValues(TorchFunctionMode):
    """Skip what would fill meta tensors with numbers: to do so torch loads a computer algebra system, for seconds."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (Tensor.normal_, nn.init.normal_, nn.init.kaiming_uniform_):
            return args[0] if args else kwargs["tensor"]
        if func is Tensor.topk:
            shape = (*args[0].shape[:-1], args[1])
            return torch.return_types.topk((torch.empty(shape), torch.empty(shape, dtype=torch.int64)))
        return func(*args, **kwargs)


def _shapes(model: Transformer) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def _comes_without_mtp(expected: Mapping[str, Slot], entries: Mapping[str, Entry]) -> bool:
    """Say whether these are files of transformers, which has no MTP and leaves the configuration's count as it was."""
    return "model.embed_tokens.weight" in expected and not any(name.startswith("mtp.") for name in entries)


def _skipped(family: Family, config: AnyConfig, name: str) -> bool:
    match = family.skipped.match(name) if family.skipped else None
    return match is not None and int(match[1]) >= config.num_hidden_layers


def _missing(path: Path, expected: Mapping[str, Slot], entries: Mapping[str, Entry]) -> list[str]:
    return [f"{path}: missing {name}, expected {list(slot.shape)}" for name, slot in expected.items() if name not in entries]


def _misfits(expected: Mapping[str, Slot], entries: Mapping[str, Entry], integers: set[str]) -> list[str]:
    found, used = [], set(expected)
    for name, slot in expected.items():
        if name not in entries:
            continue
        wrong = formats.problems(name, slot, entries=entries, integer=slot.parts[0].target in integers)
        found += [f"{entries[name].file}: {line}" for line in wrong]
        if scales := scale_name(name, entries):
            used.add(scales)
    return found + [f"{entry.file}: unexpected {name} {list(entry.shape)}" for name, entry in entries.items() if name not in used]


def _read_scales(expected: Mapping[str, Slot], entries: Mapping[str, Entry]) -> tuple[dict[str, Stored], list[str]]:
    """Read all scales: they are few, may lie in another shard than their matrices, and one that is no number spoils a block."""
    kinds = formats.PLAIN | formats.QUANTIZED | formats.INTEGERS
    stored = {name: Stored(kinds[entries[name].dtype]) for name in expected}
    owners = {scale_name(name, entries): name for name, how in stored.items() if how.format in ("fp8", "fp4")}
    problems = []
    for name, _, scales in read(entries, [name for name in owners if name], whole=lambda name: True):
        if count := nan_scales(scales):
            problems.append(f"{entries[name].file}: {name}: got {count} scales that are NaN or not positive, expected finite powers of two")
        stored[owners[name]] = stored[owners[name]]._replace(scales=scales.clone())
    return stored, problems


def _wrong_tables(config: AnyConfig, expected: Mapping[str, Slot], entries: Mapping[str, Entry]) -> list[str]:
    """List routing tables that name experts there are none of."""
    tables = [name for name, slot in expected.items() if slot.parts[0].target.endswith(".tid2eid")]
    found = []
    for name, _, table in read(entries, tables, whole=lambda name: True):
        low, high = int(table.min()), int(table.max())
        if low < 0 or high >= config.n_routed_experts:
            wrong = low if low < 0 else high
            found.append(
                f"{entries[name].file}: {name}: got expert {wrong}, expected 0 to n_routed_experts - 1 = {config.n_routed_experts - 1}"
            )
    return found


def _refuse(path: Path, problems: list[str]) -> None:
    if problems:
        rest = len(problems) - MOST_PROBLEMS
        more = [f"... and {rest} more"] if rest > 0 else []
        raise ValueError(f"{path}: the checkpoint does not fit its config.json:\n" + "\n".join([*sorted(problems)[:MOST_PROBLEMS], *more]))
