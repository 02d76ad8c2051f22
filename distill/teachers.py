"""Which teacher judges which sample, and whether it may: a student and its teachers must share one tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from model.tokenizer import Tokenizer


def refuse_foreign_teachers(student: Path, teachers: Mapping[str, Path]) -> None:
    """Check that every teacher spells and predicts the same tokens as the student.

    Args:
        student: directory of the student's start.
        teachers: domain name to teacher directory.

    Raises:
        ValueError: lists every teacher whose tokenizer or vocabulary size differs, naming both sides.
    """
    spelling, size = Tokenizer.load(student).digest(), vocabulary(student)
    found = []
    for name, path in teachers.items():
        if (theirs := vocabulary(path)) != size:
            found.append(f"teacher {name!r} ({path}) has a vocabulary of {theirs} tokens, the student ({student}) of {size}")
        elif (digest := Tokenizer.load(path).digest()) != spelling:
            found.append(f"teacher {name!r} ({path}) has tokenizer {digest[:12]}, the student ({student}) {spelling[:12]}")
    if found:
        raise ValueError("the reverse KL compares distributions over one vocabulary, but " + "; ".join(found))


def vocabulary(directory: Path) -> int:
    """Return the `vocab_size` of a model directory."""
    return int(json.loads((directory / "config.json").read_text())["vocab_size"])
