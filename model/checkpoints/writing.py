"""Write a model as a checkpoint: which format each tensor gets, and its tensors one shard at a time."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from model.checkpoints import formats
from model.checkpoints.files import Sized, write
from model.checkpoints.formats import Kept, encode, part_key, scale_shape, stored_shape
from model.checkpoints.layouts import FAMILIES, WRITTEN, Family, Slot, slots
from model.transformer import Transformer

PRECISIONS = ("fp4", "fp8", "bf16", "fp32")
"""Of the routed experts; other matrices are FP8 where these are FP4 or FP8."""

_BYTES = {"int": 8, "fp32": 4, "bf16": 2, "fp8": 1, "fp4": 1}


def write_tensors(model: Transformer, path: Path, layout: str, precision: str | None) -> set[str]:
    """Write the tensors of a model into the existing directory `path`; see `model.weights.save`.

    Returns:
        the formats of its floating-point tensors.

    Raises:
        ValueError: no such layout or precision, or one that this layout or model cannot have.
    """
    family = FAMILIES[model.config.model_type]
    _check(layout, precision)
    state = {name: value.detach() for name, value in model.state_dict().items()}
    placed = slots(family.layouts[layout], {name: tuple(value.shape) for name, value in state.items()})
    kept = formats.LOADED.get(model, {})
    chosen = {name: _format(family, slot, state[slot.parts[0].target], kept, layout, precision) for name, slot in placed.items()}
    odd = [name for name, kind in chosen.items() if kind == "fp4" and placed[name].shape[-1] % 2]
    if odd:
        raise ValueError(f"{odd[0]}: got {list(placed[odd[0]].shape)}, expected an even width for precision 'fp4'; choose 'fp8' or 'bf16'")

    def make(name: str) -> dict[str, Tensor]:
        part = placed[name].parts[0]
        values = state[part.target] if part.expert is None else state[part.target][part.expert]
        if chosen[name] == "as it is":
            return {name: values.to("cpu").contiguous()}
        stored, scales = encode(values, chosen[name], kept.get(part_key(part)))
        made = {name: stored.to("cpu").contiguous()}
        if scales is not None:
            dtype = torch.float32 if family.scale == ".weight_scale_inv" else torch.float8_e8m0fnu
            made[name.removesuffix(".weight") + family.scale] = scales.to("cpu").to(dtype)
        return made

    write(path, [Sized(name, _bytes(slot, chosen[name], state)) for name, slot in placed.items()], make)
    floating = {name for name, slot in placed.items() if state[slot.parts[0].target].dtype.is_floating_point}
    names = {torch.float32: "fp32", torch.bfloat16: "bf16"}
    return {names.get(state[placed[n].parts[0].target].dtype, "bf16") if chosen[n] == "as it is" else chosen[n] for n in floating}


def _check(layout: str, precision: str | None) -> None:
    if layout not in WRITTEN:
        raise ValueError(f"layout: got {layout!r}, expected one of {', '.join(WRITTEN)}")
    valid = PRECISIONS if layout == "official" else ("bf16", "fp32")
    if precision is not None and precision not in valid:
        raise ValueError(f"precision: got {precision!r}, expected one of {', '.join(valid)} for the {layout} layout")


def _format(family: Family, slot: Slot, values: Tensor, kept: Kept, layout: str, precision: str | None) -> str:
    """Choose how a tensor is stored: `as it is`, or one of `PRECISIONS`."""
    if not values.dtype.is_floating_point or (precision is None and layout != "official"):
        return "as it is"
    usual = family.format(slot.parts[0].target)
    if precision is None:
        before = kept.get(part_key(slot.parts[0]))
        return before.format if before is not None and before.format in PRECISIONS else usual
    if precision == "fp32" or usual == "fp32":
        return "fp32"
    if precision == "bf16" or usual == "bf16":
        return "bf16"
    return precision if slot.parts[0].expert is not None else "fp8"


def stored_bytes(slot: Slot, kind: str) -> int:
    """Bound the bytes that a tensor takes in a file in the format `kind`, scales included."""
    scales = torch.Size(scale_shape(kind, slot.shape)).numel() if kind in ("fp8", "fp4") else 0
    return torch.Size(stored_shape(kind, slot.shape)).numel() * _BYTES[kind] + 4 * scales


def _bytes(slot: Slot, kind: str, state: dict[str, Tensor]) -> int:
    if kind == "as it is":
        return torch.Size(slot.shape).numel() * state[slot.parts[0].target].element_size()
    return stored_bytes(slot, kind)
