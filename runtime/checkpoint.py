"""Checkpoints that are whole or absent: atomic commit, verification, the newest valid one on resume.

A checkpoint directory appears by one rename after all its files and a manifest with their digests are on disk. A reader
trusts nothing but the manifest. Damaged directories are set aside as `*.corrupt`, never deleted silently.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

FOLDER = "checkpoints"
"""Where a step's checkpoints lie in its work directory."""

MANIFEST = "MANIFEST.json"
KEPT = 2
"""Committed checkpoints that stay; an older one goes only after a newer one was committed."""


def commit(directory: Path, step: int, *, write: Callable[[Path], None], state: dict[str, Any]) -> Path:
    """Write a checkpoint and make it visible in one rename: `begin` and `publish`.

    Args:
        directory: where a step's checkpoints lie.
        step: optimizer steps done.
        write: fills a directory (on a file system that the ranks share).
        state: JSON-able state of the loop: data cursor, counters.

    Returns:
        the committed directory, `step-000123`.

    Raises:
        OSError: the disk refused a write; nothing was committed, the previous checkpoint stands.
    """
    return publish(begin(directory, step, write=write, state=state))


def begin(directory: Path, step: int, *, write: Callable[[Path], None], state: dict[str, Any]) -> Path:
    """Write a checkpoint's files where no reader looks; arguments and errors as of `commit`. Returns the directory for `publish`."""
    directory.mkdir(parents=True, exist_ok=True)
    for stale in directory.glob(".tmp-*"):
        shutil.rmtree(stale)
    temporary = directory / f".tmp-{step:06d}"
    temporary.mkdir()
    write(temporary)
    _write_synced(temporary / "state.json", json.dumps({"step": step} | state).encode())
    return temporary


def publish(temporary: Path) -> Path:
    """Hash and flush what `begin` wrote, give it its name, drop the oldest; returns the committed directory."""
    directory, number = temporary.parent, temporary.name.removeprefix(".tmp-")
    final = directory / f"step-{number}"
    seal(temporary, {"step": int(number)})
    if final.exists():  # a newer attempt redid the step after this one had been found damaged or was rewound
        shutil.rmtree(final)
    os.rename(temporary, final)
    sync_directory(directory)
    for old in sorted(directory.glob("step-??????"))[:-KEPT]:
        shutil.rmtree(old)
    return final


def newest(directory: Path) -> tuple[Path, dict[str, Any]] | None:
    """Return the newest checkpoint that verifies and its loop state; damaged ones are renamed `*.corrupt` and named in the log."""
    for path in sorted(directory.glob("step-??????"), reverse=True):
        try:
            verify(path)
        except ValueError as error:
            logger.warning("%s; using the one before it", error)
            set_aside(path)
            continue
        return path, json.loads((path / "state.json").read_text())
    return None


def newest_step(directory: Path) -> int | None:
    """Return the optimizer steps done at the newest checkpoint, unverified, for whoever only looks; None where there is none."""
    return max((int(path.name.removeprefix("step-")) for path in directory.glob("step-??????")), default=None)


def seal(directory: Path, about: dict[str, Any]) -> None:
    """Write the manifest: every file's size and SHA-256, after flushing them and before flushing the directory."""
    files = []
    for path in sorted(p for p in directory.rglob("*") if p.is_file()):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
        files.append({"path": str(path.relative_to(directory)), "size": path.stat().st_size, "sha256": digest})
    _write_synced(directory / MANIFEST, json.dumps(about | {"files": files}, indent=1).encode())
    sync_directory(directory)


def verify(directory: Path) -> dict[str, Any]:
    """Check a sealed directory against its manifest and return the manifest.

    Raises:
        ValueError: the manifest is missing or unreadable, or a file is missing or differs; names the file.
    """
    try:
        manifest = json.loads((directory / MANIFEST).read_text())
        listed = [(directory / f["path"], f["size"], f["sha256"]) for f in manifest["files"]]
    except (FileNotFoundError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{directory}: damaged: no readable {MANIFEST} ({error})") from error
    for path, size, sha256 in listed:
        if not path.is_file() or path.stat().st_size != size:
            raise ValueError(f"{directory}: damaged: {path.name} is missing or has the wrong size, expected {size} bytes")
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                raise ValueError(f"{directory}: damaged: the content of {path.name} differs from its manifest")
    return manifest


def set_aside(path: Path) -> Path:
    """Rename a damaged directory to the first free `*.corrupt`, `*.corrupt-2` ... and return its new name."""
    number = 1
    while (target := path.with_name(path.name + (".corrupt" if number == 1 else f".corrupt-{number}"))).exists():
        number += 1
    os.rename(path, target)
    return target


def sync_directory(directory: Path) -> None:
    """Flush a directory's entries to disk, so that a rename in it survives a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
