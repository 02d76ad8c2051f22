"""The files of a checkpoint: shards and their index, read a window at a time and written whole or not at all."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from model.checkpoints.settings import CONFIG, read_json, write_json

logger = logging.getLogger(__name__)

TENSORS, INDEX = "model.safetensors", "model.safetensors.index.json"

SHARD_BYTES = 4 * 10**9
"""Most bytes of a shard that we write, unless one tensor alone has more."""

WINDOW_BYTES = 256 * 2**20
"""Bytes of a file mapped at once: what a read holds beside the model."""

_WIDTHS = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2}


class Entry(NamedTuple):
    """A tensor in a file: its dtype as safetensors spells it, and its shape."""

    file: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Count the bytes of its values."""
        return torch.Size(self.shape).numel() * _WIDTHS.get(self.dtype, 1)


def list_tensors(path: Path) -> dict[str, Entry]:
    """Read the headers of all files of a checkpoint, and nothing else.

    Args:
        path: the directory.

    Returns:
        every tensor by name.

    Raises:
        FileNotFoundError: there are no files of tensors.
        ValueError: shards are missing or damaged, or they and the index disagree; all at once.
    """
    placed = _placed(path)
    files = sorted(set(placed.values())) if placed else [path / TENSORS]
    problems = [f"{file}: missing, expected {_count(placed, file)} tensors as {INDEX} says" for file in files if not file.is_file()]
    found: dict[str, Entry] = {}
    for file in files:
        if not file.is_file():
            continue
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (not a mapping)
                    piece = opened.get_slice(name)
                    found[name] = Entry(file, piece.get_dtype(), tuple(piece.get_shape()))
        except SafetensorError as error:
            problems.append(f"{file}: damaged: got {file.stat().st_size} bytes, expected {_expected_size(file)} ({error})")
            placed = {name: place for name, place in placed.items() if place != file}
    if not problems:
        problems = [
            f"{file}: missing {name}, expected it as {INDEX} says"
            for name, file in placed.items()
            if name not in found or found[name].file != file
        ]
    if problems:
        raise ValueError("\n".join(problems))
    return found


def read(entries: Mapping[str, Entry], names: Iterable[str], *, whole: Callable[[str], bool]) -> Iterator[tuple[str, int, Tensor]]:
    """Yield tensors file by file in the order they lie there, never mapping more than a window.

    Args:
        entries: where they are.
        names: which ones.
        whole: says of a name that it must come in one piece, however large.

    Yields:
        name, first row, and the rows from there on: all of a tensor that fits into a window, else some. To be used before the next is
        asked for.
    """
    by_file: dict[Path, set[str]] = {}
    for name in names:
        by_file.setdefault(entries[name].file, set()).add(name)
    for file, wanted in sorted(by_file.items()):
        with safe_open(file, framework="pt") as opened:
            order = [name for name in opened.offset_keys() if name in wanted]
        for window in _windows(entries, order, whole):
            with safe_open(file, framework="pt") as opened:  # opened anew: what was mapped counts as ours until it is closed
                for name, first, last in window:
                    yield name, first, opened.get_slice(name)[first:last] if entries[name].shape else opened.get_tensor(name)


def _windows(entries: Mapping[str, Entry], order: list[str], whole: Callable[[str], bool]) -> Iterator[list[tuple[str, int, int]]]:
    window: list[tuple[str, int, int]] = []
    used = 0
    for name in order:
        entry = entries[name]
        rows = entry.shape[0] if entry.shape else 1
        step = rows
        if entry.bytes > WINDOW_BYTES and not whole(name):
            step = max(1, rows * WINDOW_BYTES // entry.bytes)
        for first in range(0, rows, max(step, 1)):
            last = min(first + step, rows)
            size = entry.bytes * (last - first) // max(rows, 1)
            if window and used + size > WINDOW_BYTES:
                yield window
                window, used = [], 0
            window.append((name, first, last))
            used += size
    if window:
        yield window


class Sized(NamedTuple):
    """Tensors that belong into one shard together, under what name they are made, and their bytes."""

    name: str
    bytes: int


def write(path: Path, sizes: Iterable[Sized], *, make: Callable[[str], dict[str, Tensor]]) -> None:
    """Write tensors as shards of at most `SHARD_BYTES` and their index, or as one file where one is enough.

    Args:
        path: an existing directory.
        sizes: what is to be written, in order.
        make: returns the tensors of one of `sizes`; called once each, and at most one shard of results is held.
    """
    shards: list[list[Sized]] = [[]]
    for size in sizes:
        if shards[-1] and sum(s.bytes for s in shards[-1]) + size.bytes > SHARD_BYTES:
            shards.append([])
        shards[-1].append(size)
    placed: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(shards, 1):
        file = TENSORS if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {name: value for size in shard for name, value in make(size.name).items()}
        save_file(tensors, path / file, {"format": "pt"})
        (path / file).chmod(path.stat().st_mode & 0o666)  # it would be ours alone to read
        logger.info("%s written (%d of %d)", file, number, len(shards))
        placed |= dict.fromkeys(tensors, file)
        total += sum(value.numel() * value.element_size() for value in tensors.values())
    if len(shards) > 1:
        write_json(path / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))})


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """Give an empty directory to write into, and put what it holds in the place of `path` at the end; after an error nothing is there.

    Into a directory that holds other files already, ours are moved one by one, `config.json` last: without it nothing can be read.
    """
    path = path.absolute()
    temporary = path.with_name(f".{path.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in temporary.iterdir():
            _flush(file)
        if not path.exists() or not any(path.iterdir()):
            os.rename(temporary, path)  # replaces an empty directory
        else:
            _merge(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _flush(path.parent)


def _merge(temporary: Path, path: Path) -> None:
    (path / CONFIG).unlink(missing_ok=True)
    for stale in [*path.glob("model*.safetensors"), *path.glob(INDEX)]:
        stale.unlink()
    for file in sorted(temporary.iterdir(), key=lambda file: file.name == CONFIG):
        os.replace(file, path / file.name)
    _flush(path)


def _placed(path: Path) -> dict[str, Path]:
    """Read which file each tensor is in, empty for a checkpoint of one file."""
    if (path / INDEX).is_file():
        placed = read_json(path / INDEX).get("weight_map")
        if not isinstance(placed, dict) or not placed or any(Path(str(file)).name != file for file in placed.values()):
            raise ValueError(f"{path / INDEX}: weight_map: got {str(placed)[:80]}, expected a file of this directory for every tensor")
        return {name: path / file for name, file in placed.items()}
    if not (path / TENSORS).is_file():
        shards = sorted(path.glob("model-*-of-*.safetensors"))
        expected = INDEX if shards else f"it or {INDEX}"
        raise FileNotFoundError(f"{path / (INDEX if shards else TENSORS)}: no such file, expected {expected} in a checkpoint")
    return {}


def _count(placed: Mapping[str, Path], file: Path) -> int:
    return sum(place == file for place in placed.values())


def _expected_size(file: Path) -> str:
    """Say how long a file claims to be: 8 bytes of header length, the header, and the tensors."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        try:
            header = json.loads(opened.read(min(length, 10**8)))
            return str(8 + length + max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"))
        except (ValueError, TypeError, KeyError):
            return "a whole safetensors file"


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
