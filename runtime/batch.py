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
    """

    tokens: Sequence[int]
    targets: Sequence[bool]
    fields: dict[str, Sequence[float] | NDArray[np.float32]] = field(default_factory=dict)
    teacher: str = ""


@dataclass
class Batch:
    """One packed row: N samples end to end, none of which sees another.

    Attributes:
        tokens: [T] int64.
        cu_seqlens: [N+1] int64, where samples begin; the last entry is T.
        targets: [T] bool, True where the token is predicted by the loss.
        fields: name to [T] float32.
        teacher: name of the frozen model for the whole row, or "".
    """

    tokens: NDArray[np.int64]
    cu_seqlens: NDArray[np.int64]
    targets: NDArray[np.bool_]
    fields: dict[str, NDArray[np.float32]]
    teacher: str = ""

    @property
    def target_count(self) -> int:
        """Tokens that the loss predicts."""
        return int(self.targets.sum())

    def emptied(self) -> Batch:
        """Return the row without targets: it trains nothing, and keeps a rank with fewer rows in step with the others."""
        return Batch(self.tokens, self.cu_seqlens, np.zeros_like(self.targets), self.fields, self.teacher)


def pack(sequences: Sequence[PackedSample], *, row_tokens: int) -> list[Batch]:
    """Pack samples into as few rows of at most `row_tokens` as first-fit-decreasing finds, rows of one teacher together.

    A sample longer than `row_tokens` gets a row of its own. The order is a function of the lengths alone.
    """
    rows: list[tuple[str, int, list[PackedSample]]] = []
    for sequence in sorted(sequences, key=lambda s: (s.teacher, -len(s.tokens))):
        size = len(sequence.tokens)
        for i, (teacher, used, members) in enumerate(rows):
            if teacher == sequence.teacher and used + size <= row_tokens:
                rows[i] = (teacher, used + size, [*members, sequence])
                break
        else:
            rows.append((sequence.teacher, size, [sequence]))
    return [_concatenate(members) for _, _, members in rows]


def _concatenate(members: list[PackedSample]) -> Batch:
    lengths = [len(m.tokens) for m in members]
    targets = [np.asarray(m.targets, dtype=bool) for m in members]
    for mask in targets:
        assert not mask[0], "the first token of a sample has nothing before it to be predicted from"
    return Batch(
        tokens=np.concatenate([np.asarray(m.tokens, dtype=np.int64) for m in members]),
        cu_seqlens=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        targets=np.concatenate(targets),
        fields={name: np.concatenate([np.asarray(m.fields[name], dtype=np.float32) for m in members]) for name in members[0].fields},
        teacher=members[0].teacher,
    )


def split(batches: Sequence[Batch], ranks: int) -> list[list[Batch]]:
    """Deal rows to ranks, heaviest first, each rank the same number of rows (short ones get an emptied row)."""
    order = sorted(range(len(batches)), key=lambda i: (batches[i].teacher, -len(batches[i].tokens), i))
    dealt: list[list[Batch]] = [[] for _ in range(ranks)]
    for place, i in enumerate(order):
        dealt[place % ranks].append(batches[i])
    most = max(len(rows) for rows in dealt)
    for rows in dealt:
        rows += [batches[order[-1]].emptied() for _ in range(most - len(rows))]
    return dealt
