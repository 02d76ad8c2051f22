"""Packed rows of samples: what travels from a loop to the ranks. Knows no torch, so that loops stay light."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


@dataclass
class PackedSample:
    """One sample on its way into a row.

    Attributes:
        tokens: [T] token ids.
        targets: [T] True where the token is predicted by the loss; never the first.
        fields: name to [T] float32, values per token that the loss reads (log-probs, advantages).
        teacher: name of the frozen model that the loss compares with; rows hold one teacher each.
        shared: how many of the first tokens, none of them a target, other samples may begin with too; a row computes them once.
    """

    tokens: Sequence[int]
    targets: Sequence[bool]
    fields: dict[str, Sequence[float] | NDArray[np.float32]] = field(default_factory=dict)
    teacher: str = ""
    shared: int = 0

    @property
    def beginning(self) -> tuple[int, ...]:
        """The tokens that other samples may share, () for none."""
        return tuple(self.tokens[: self.shared])


@dataclass
class Batch:
    """One packed row: N samples end to end, none of which sees another.

    Attributes:
        tokens: [T] int64.
        cu_seqlens: [N+1] int64, where samples begin; the last entry is T.
        targets: [T] bool, True where the token is predicted by the loss.
        fields: name to [T] float32.
        teacher: name of the frozen model for the whole row, or "".
        source: [T] int64, which computed token each token is, where samples share their beginnings; None when every token is computed.
    """

    tokens: NDArray[np.int64]
    cu_seqlens: NDArray[np.int64]
    targets: NDArray[np.bool_]
    fields: dict[str, NDArray[np.float32]]
    teacher: str = ""
    source: NDArray[np.int64] | None = None

    @property
    def computed(self) -> int:
        """Tokens that a model computes for this row."""
        return len(self.tokens) if self.source is None else int(self.source.max()) + 1

    @property
    def target_count(self) -> int:
        """Tokens that the loss predicts."""
        return int(self.targets.sum())

    def emptied(self) -> Batch:
        """Return the row without targets: it trains nothing, and keeps a rank with fewer rows in step with the others."""
        return Batch(self.tokens, self.cu_seqlens, np.zeros_like(self.targets), self.fields, self.teacher, self.source)


def pack(sequences: Sequence[PackedSample], *, row_tokens: int) -> list[Batch]:
    """Pack samples into as few rows of at most `row_tokens` computed tokens as first-fit-decreasing finds, rows of one teacher together.

    Samples that share their first tokens stay together where they fit. A sample longer than `row_tokens` gets a row of its own. The order
    is a function of the lengths and of who shares with whom.
    """
    groups: dict[tuple, list[PackedSample]] = {}
    for i, sequence in enumerate(sequences):
        groups.setdefault((sequence.teacher, *(sequence.beginning or (i,))), []).append(sequence)
    rows: list[_Row] = []
    for members in sorted(groups.values(), key=lambda g: (g[0].teacher, -max(len(m.tokens) for m in g))):
        for member in sorted(members, key=lambda m: -len(m.tokens)):
            fitting = [row for row in rows if row.teacher == member.teacher and row.used + row.cost(member) <= row_tokens]
            row = next((row for row in fitting if member.beginning in row.beginnings), fitting[0] if fitting else None)
            if row is None:
                rows.append(row := _Row(member.teacher))
            row.add(member)
    return [_concatenate(row.members) for row in rows]


@dataclass
class _Row:
    """A row being filled; `used` counts the tokens to compute."""

    teacher: str
    used: int = 0
    members: list[PackedSample] = field(default_factory=list)
    beginnings: set[tuple[int, ...]] = field(default_factory=set)

    def cost(self, sample: PackedSample) -> int:
        return len(sample.tokens) - (len(sample.beginning) if sample.beginning in self.beginnings else 0)

    def add(self, sample: PackedSample) -> None:
        self.used += self.cost(sample)
        self.members.append(sample)
        if sample.beginning:
            self.beginnings.add(sample.beginning)


def _concatenate(members: list[PackedSample]) -> Batch:
    lengths = [len(m.tokens) for m in members]
    targets = [np.asarray(m.targets, dtype=bool) for m in members]
    for member, mask in zip(members, targets, strict=True):
        assert not mask[0], "the first token of a sample has nothing before it to be predicted from"
        assert not mask[: member.shared].any(), "a shared token cannot be a target: each sample weighs its own"
    return Batch(
        tokens=np.concatenate([np.asarray(m.tokens, dtype=np.int64) for m in members]),
        cu_seqlens=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        targets=np.concatenate(targets),
        fields={name: np.concatenate([np.asarray(m.fields[name], dtype=np.float32) for m in members]) for name in members[0].fields},
        teacher=members[0].teacher,
        source=_source(members),
    )


def _source(members: list[PackedSample]) -> NDArray[np.int64] | None:
    """Number the tokens to compute; a beginning that came before gets the numbers it had then. None where nothing is shared."""
    beginnings: dict[tuple[int, ...], NDArray[np.int64]] = {}
    parts, computed = [], 0
    for member in members:
        known = beginnings.get(member.beginning, np.empty(0, np.int64))
        fresh = np.arange(computed, computed + len(member.tokens) - len(known))
        computed += len(fresh)
        parts.append(np.concatenate([known, fresh]))
        if member.beginning:
            beginnings.setdefault(member.beginning, parts[-1][: member.shared])
    source = np.concatenate(parts)
    return None if computed == len(source) else source


def split(batches: Sequence[Batch], ranks: int) -> list[list[Batch]]:
    """Deal rows to ranks, heaviest first, each rank the same number of rows (short ones get an emptied row)."""
    order = sorted(range(len(batches)), key=lambda i: (batches[i].teacher, -batches[i].computed, i))
    dealt: list[list[Batch]] = [[] for _ in range(ranks)]
    for place, i in enumerate(order):
        dealt[place % ranks].append(batches[i])
    most = max(len(rows) for rows in dealt)
    for rows in dealt:
        rows += [batches[order[-1]].emptied() for _ in range(most - len(rows))]
    return dealt
