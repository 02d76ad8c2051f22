"""Keep what steps hand on: content-addressed directories, committed atomically, verified when used."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
SCHEMA = 1


@dataclass(frozen=True)
class Artifact:
    """A committed directory and what its manifest says.

    Attributes:
        path: the directory.
        manifest: `step`, `key`, `recipe` (what the key digests), `inputs` (step to key), `summary`, `elapsed_s`, `files`.
    """

    path: Path
    manifest: dict[str, Any]


def digest(value: Any) -> str:
    """Return the sha256 of a JSON-able value in canonical form."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


class Store:
    """The artifacts under `outputs/artifacts`: `<step>-<key12>/` when committed, `.work/<step>-<key12>/` while being made."""

    def __init__(self, root: Path) -> None:
        """Open a store; the directory is made when first written."""
        self.root = root

    def path(self, step: str, key: str) -> Path:
        """Where the committed artifact is, or would be."""
        return self.root / f"{step}-{key[:12]}"

    def workdir(self, step: str, key: str) -> Path:
        """Where the step works until it is done."""
        return self.root / ".work" / f"{step}-{key[:12]}"

    def find(self, step: str, key: str, *, thorough: bool = True) -> Artifact | None:
        """Look an artifact up; a damaged one is set aside as `*.corrupt`, by name in the log, and counts as absent.

        Args:
            step: name of the step.
            key: its full key.
            thorough: hash every file; False only compares sizes, changes nothing, and suits a plan.
        """
        path = self.path(step, key)
        if not path.is_dir():
            return None
        try:
            return Artifact(path, verify(path, key, thorough=thorough))
        except ValueError as damage:
            if thorough:
                aside = _aside(path)
                logger.warning("damaged artifact set aside as %s: %s", aside, damage)
            return None

    @contextmanager
    def lock(self, step: str, key: str, *, waiting: Callable[[], None]) -> Iterator[None]:
        """Hold the step's work directory; the kernel lets go when the process dies, however it dies.

        Args:
            step: name of the step.
            key: its full key.
            waiting: called once if somebody else holds it.
        """
        path = self.workdir(step, key).with_suffix(".lock")
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                waiting()
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def commit(self, step: str, key: str, manifest: dict[str, Any]) -> Artifact:
        """Make `workdir/artifact` the artifact: flush its files, write the manifest last, rename; then drop the work directory.

        Args:
            step: name of the step.
            key: its full key.
            manifest: everything but `schema`, `step`, `key` and `files`, which are added.

        Raises:
            OSError: the disk is full or broken; nothing is committed, the work directory stays.
        """
        workdir, target = self.workdir(step, key), self.path(step, key)
        made = workdir / "artifact"
        (made / MANIFEST).unlink(missing_ok=True)
        files = [_flushed(path, made) for path in sorted(made.rglob("*")) if path.is_file()]
        complete = {"schema": SCHEMA, "step": step, "key": key} | manifest | {"files": files}
        _write_flushed(made / MANIFEST, json.dumps(complete, indent=1))
        for folder in [path for path in made.rglob("*") if path.is_dir()] + [made]:
            _flush_directory(folder)
        os.rename(made, target)
        _flush_directory(self.root)
        shutil.rmtree(workdir)
        return Artifact(target, complete)

    def nearest(self, step: str, recipe: dict[str, Any]) -> tuple[Artifact, list[str]] | None:
        """Find the artifact of a step whose recipe differs least, and name the keys that differ."""
        best: tuple[Artifact, list[str]] | None = None
        for path in sorted(self.root.glob(f"{step}-*/{MANIFEST}")):
            manifest = json.loads(path.read_text())
            if manifest["step"] != step:
                continue
            apart = differences(manifest["recipe"], recipe)
            if best is None or len(apart) < len(best[1]):
                best = (Artifact(path.parent, manifest), apart)
        return best


def verify(path: Path, key: str, *, thorough: bool = True) -> dict[str, Any]:
    """Read an artifact's manifest and check its files against it.

    Raises:
        ValueError: no readable manifest, another key, or a file missing, of another size, or (when thorough) of another content.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text())
    except (FileNotFoundError, json.JSONDecodeError) as error:
        raise ValueError(f"{path / MANIFEST}: no readable manifest ({error})") from error
    if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA or manifest.get("key") != key:
        raise ValueError(f"{path / MANIFEST}: expected schema {SCHEMA} and key {key}")
    for entry in manifest["files"]:
        file = path / entry["path"]
        if not file.is_file() or file.stat().st_size != entry["size"]:
            raise ValueError(f"{file}: missing or not {entry['size']} bytes")
        if thorough and _sha256(file) != entry["sha256"]:
            raise ValueError(f"{file}: content differs from its sha256 in the manifest")
    return manifest


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """List the leaves in which two JSON-able trees differ, as `key: old -> new`."""
    if isinstance(old, dict) and isinstance(new, dict):
        names = list(dict.fromkeys([*old, *new]))
        return [line for name in names for line in differences(old.get(name), new.get(name), f"{prefix}.{name}" if prefix else str(name))]
    return [] if old == new else [f"{prefix}: {_brief(old)} -> {_brief(new)}"]


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _aside(path: Path) -> Path:
    target, number = path.with_name(path.name + ".corrupt"), 2
    while target.exists():
        target, number = path.with_name(f"{path.name}.corrupt{number}"), number + 1
    os.rename(path, target)
    return target


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flushed(path: Path, root: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return {"path": str(path.relative_to(root)), "size": path.stat().st_size, "sha256": _sha256(path)}


def _write_flushed(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _flush_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Journal:
    """A run's transitions, one JSON object a line, on the disk before anything else happens."""

    def __init__(self, path: Path) -> None:
        """Continue the journal at `path`; its directory must exist."""
        self.path = path

    def write(self, event: str, **values: Any) -> None:
        """Append one transition: `event`, `time` (seconds since 1970), and what belongs to it."""
        with self.path.open("a") as file:
            file.write(json.dumps({"time": round(time.time(), 3), "event": event} | values) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def read(self) -> list[dict[str, Any]]:
        """Read all transitions; a torn last line, left by a kill, is dropped."""
        if not self.path.exists():
            return []
        lines = self.path.read_text().split("\n")[:-1]
        return [json.loads(line) for line in lines if line]
