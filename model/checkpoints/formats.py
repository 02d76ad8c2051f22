"""How the numbers of a tensor are stored: fp32, bf16, FP8 in blocks of 128 by 128, FP4 in groups of 32, and back.

Scales are powers of two, so bf16 holds every stored value exactly. Several scales can give the same values (a block whose largest value is
3 under scale 2 is one whose largest is 6 under scale 1): what was loaded is therefore remembered with its scales, and a tensor that did
not change since is stored again under the same ones, byte for byte.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from model.checkpoints.files import Entry
from model.checkpoints.layouts import SCALES, Part, Slot
from model.quant.blocks import scale_shape as blocks_of
from model.quant.fp8 import WEIGHT_BLOCK, dequantize_fp8, quantize_fp8
from model.quant.mxfp4 import GROUP, dequantize_mxfp4, quantize_mxfp4

PLAIN = {"F32": "fp32", "BF16": "bf16", "F16": "fp16"}
QUANTIZED = {"F8_E4M3": "fp8", "I8": "fp4", "U8": "fp4", "F4": "fp4"}
INTEGERS = {"I64": "int", "I32": "int"}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Stored(NamedTuple):
    """In which format a tensor was stored, and under which scales."""

    format: str
    scales: Tensor | None = None


Kept = dict[tuple[str, int | None], Stored]

LOADED: WeakKeyDictionary[nn.Module, Kept] = WeakKeyDictionary()
"""How the tensors of each model that was loaded were stored, by name in its state and expert; forgotten with the model."""


def scale_name(name: str, entries: Mapping[str, Entry]) -> str | None:
    """Return which stored tensor holds the scales of the matrix `name`, None when there is none."""
    stem = name.removesuffix(".weight")
    return next((stem + ending for ending in SCALES if stem + ending in entries), None)


def problems(name: str, slot: Slot, *, entries: Mapping[str, Entry], integer: bool) -> list[str]:
    """List what is wrong with the stored tensor `name`, as `name: got, expected`; its numbers aside.

    Args:
        name: in the files.
        slot: the shape its values must have.
        entries: everything in the files.
        integer: whether its values are whole numbers.
    """
    entry, scales = entries[name], scale_name(name, entries)
    kind = INTEGERS.get(entry.dtype) if integer else (PLAIN | QUANTIZED).get(entry.dtype)
    if kind is None or (kind in ("fp8", "fp4") and len(slot.shape) != 2):
        valid = INTEGERS if integer else PLAIN | (QUANTIZED if len(slot.shape) == 2 else {})
        return [f"{name}: got dtype {entry.dtype}, expected {' or '.join(valid)} of shape {list(slot.shape)}"]
    expected = stored_shape(kind, slot.shape)
    found = [] if entry.shape == expected else [f"{name}: got shape {list(entry.shape)} {entry.dtype}, expected {list(expected)}"]
    if kind not in ("fp8", "fp4"):
        return found + ([f"{scales}: unexpected, {name} is {entry.dtype} and has no scales"] if scales else [])
    if scales is None:
        return [*found, f"{name.removesuffix('.weight')}{SCALES[0]}: missing, expected {list(scale_shape(kind, slot.shape))} F8_E8M0"]
    if entries[scales].shape != scale_shape(kind, slot.shape) or entries[scales].dtype not in ("F8_E8M0", "F32"):
        got = f"{scales}: got {list(entries[scales].shape)} {entries[scales].dtype}"
        found.append(f"{got}, expected {list(scale_shape(kind, slot.shape))} F8_E8M0 or F32")
    return found


def stored_shape(kind: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape in which a tensor is stored: FP4 lies two to a byte along the rows."""
    return (*shape[:-1], shape[-1] // 2) if kind == "fp4" else shape


def scale_shape(kind: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of the scales of a matrix [N, K]."""
    return blocks_of(shape, WEIGHT_BLOCK if kind == "fp8" else (1, GROUP))


def nan_scales(scales: Tensor) -> int:
    """Count the scales that are no number (0xFF in ue8m0), or no power of two that FP8 and FP4 can be multiplied by."""
    if scales.dtype == torch.float8_e8m0fnu:
        return int((scales.view(torch.uint8) == 255).sum())
    return int((~(scales.isfinite() & (scales > 0))).sum())


def decode(stored: Tensor, how: Stored, *, dtype: torch.dtype) -> Tensor:
    """Return the values of a stored tensor; those of a quantised one in `dtype`."""
    if how.scales is None:
        return stored
    scales = how.scales.to(stored.device)
    if how.format == "fp8":
        return dequantize_fp8(stored, scales, dtype=dtype)
    return dequantize_mxfp4(stored.view(torch.int8), scales, dtype=dtype)


def encode(values: Tensor, kind: str, *, kept: Stored | None) -> tuple[Tensor, Tensor | None]:
    """Store values in a format.

    Args:
        values: any float dtype, a matrix [N, K] where the format has scales.
        kind: `fp32`, `bf16`, `fp8` or `fp4`.
        kept: how the tensor was stored when it was loaded.

    Returns:
        what goes into the file, and its scales: those it was loaded with where they still give exactly these values, else new ones.

    Raises:
        ValueError: numbers are not finite.
    """
    if kind in DTYPES:
        return values.to(DTYPES[kind]), None
    if kept is not None and kept.format == kind and kept.scales is not None and (again := _again(values, kept)) is not None:
        return again, kept.scales
    return quantize_fp8(values) if kind == "fp8" else quantize_mxfp4(values)


def _again(values: Tensor, kept: Stored) -> Tensor | None:
    """Store values under the scales they were loaded with; None where these do not give exactly the values."""
    assert kept.scales is not None
    scales = kept.scales.to(values.device)
    try:
        stored, _ = quantize_fp8(values, scales=scales) if kept.format == "fp8" else quantize_mxfp4(values, scales=scales)
    except ValueError:  # trained beyond what the old scales can hold
        return None
    return stored if torch.equal(decode(stored, kept, dtype=torch.float32), values.float()) else None


def powers_of_two(scales: Tensor) -> Tensor | None:
    """Return scales as ue8m0, None where one is no power of two."""
    if scales.dtype == torch.float8_e8m0fnu:
        return scales
    exact = scales.to(torch.float8_e8m0fnu)
    return exact if torch.equal(exact.float(), scales) else None


def part_key(part: Part) -> tuple[str, int | None]:
    """Return under what a part of the model is remembered in `LOADED`."""
    return part.target, part.expert
