"""Write a model as a checkpoint: which format each tensor gets, and its tensors one shard at a time."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from model.checkpoints import formats
from model.checkpoints.files import Sized, write
from model.checkpoints.formats import Stored, encode, part_key, scale_shape, stored_shape
from model.checkpoints.layouts import FAMILIES, WRITTEN, Slot, slots
from model.transformer import Transformer

PRECISIONS = ("fp4", "fp8", "bf16", "fp32")
"""Of the routed experts; other matrices are FP8 where these are FP4 or FP8."""

AS_IT_IS = "as it is"

_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
_BYTES = {"int": 8, "fp32": 4, "bf16": 2, "fp8": 1, "fp4": 1}


def write_tensors(model: Transformer, path: Path, *, layout: str, precision: str | None) -> set[str]:
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

    def choose(slot: Slot) -> str:
        part = slot.parts[0]
        if not state[part.target].dtype.is_floating_point:
            return AS_IT_IS
        usual, before = family.format(part.target), kept.get(part_key(part))
        return _format(usual, before, layout=layout, precision=precision, expert=part.expert is not None)

    chosen = {name: choose(slot) for name, slot in placed.items()}
    _refuse_odd({name: slot for name, slot in placed.items() if chosen[name] == "fp4"})

    def make(name: str) -> dict[str, Tensor]:
        part = placed[name].parts[0]
        values = state[part.target] if part.expert is None else state[part.target][part.expert]
        if chosen[name] == AS_IT_IS:
            return {name: values.to("cpu").contiguous()}
        stored, scales = encode(values, chosen[name], kept=kept.get(part_key(part)))
        made = {name: stored.to("cpu").contiguous()}
        if scales is not None:
            dtype = torch.float32 if family.scale == ".weight_scale_inv" else torch.float8_e8m0fnu
            made[name.removesuffix(".weight") + family.scale] = scales.to("cpu").to(dtype)
        return made

    write(path, [Sized(name, _bytes(slot, chosen[name], state)) for name, slot in placed.items()], make=make)
    dtypes = {name: state[slot.parts[0].target].dtype for name, slot in placed.items()}
    return {_NAMES.get(dtypes[name], "") if kind == AS_IT_IS else kind for name, kind in chosen.items()} - {""}


def _check(layout: str, precision: str | None) -> None:
    if layout not in WRITTEN:
        raise ValueError(f"layout: got {layout!r}, expected one of {', '.join(WRITTEN)}")
    valid = PRECISIONS if layout == "official" else ("bf16", "fp32")
    if precision is not None and precision not in valid:
        raise ValueError(f"precision: got {precision!r}, expected one of {', '.join(valid)} for the {layout} layout")


def _refuse_odd(packed: dict[str, Slot]) -> None:
    """Refuse what cannot lie two to a byte."""
    for name, slot in packed.items():
        if slot.shape[-1] % 2:
            raise ValueError(f"{name}: got {list(slot.shape)}, expected an even width for precision 'fp4'; choose 'fp8' or 'bf16'")


def _format(usual: str, before: Stored | None, *, layout: str, precision: str | None, expert: bool) -> str:
    """Choose how a tensor is stored: `AS_IT_IS`, or one of `PRECISIONS`; `usual` is the release's choice, `before` how it was loaded."""
    if precision is None and layout != "official":
        return AS_IT_IS
    if precision is None:
        return before.format if before is not None and before.format in PRECISIONS else usual
    if precision == "fp32" or usual == "fp32":
        return "fp32"
    if precision == "bf16" or usual == "bf16":
        return "bf16"
    return precision if expert else "fp8"


def stored_bytes(slot: Slot, kind: str) -> int:
    """Bound the bytes that a tensor takes in a file in the format `kind`, scales included."""
    scales = torch.Size(scale_shape(kind, slot.shape)).numel() if kind in ("fp8", "fp4") else 0
    return torch.Size(stored_shape(kind, slot.shape)).numel() * _BYTES[kind] + 4 * scales


def _bytes(slot: Slot, kind: str, state: dict[str, Tensor]) -> int:
    if kind == AS_IT_IS:
        return torch.Size(slot.shape).numel() * state[slot.parts[0].target].element_size()
    return stored_bytes(slot, kind)
