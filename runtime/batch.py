"""Packed rows of samples: what travels from a loop to the ranks. Knows no torch, so that loops stay light."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil

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


def pack(sequences: Sequence[PackedSample], *, row_tokens: int, ranks: int = 1) -> list[Batch]:
    """Pack samples into rows of about one size, as few as hold them, a multiple of the ranks where one teacher judges all.

    Samples that share their first tokens stay together where they fit. A sample longer than a row gets one of its own. The order is a
    function of the lengths, of who shares with whom, and of the ranks.

    Args:
        sequences: the samples.
        row_tokens: most computed tokens of a row.
        ranks: among which the rows will be dealt.
    """
    groups: dict[tuple, list[PackedSample]] = {}
    for i, sequence in enumerate(sequences):
        groups.setdefault((sequence.teacher, *(sequence.beginning or (i,))), []).append(sequence)
    total = sum(_cost(members) for members in groups.values())
    size = min(row_tokens, ceil(total / (ranks * ceil(total / (ranks * row_tokens))))) if total else row_tokens
    rows: list[list[PackedSample]] = []
    for teacher in sorted({sequence.teacher for sequence in sequences}):
        pieces = [piece for key, members in groups.items() if key[0] == teacher for piece in _pieces(members, size)]
        rows += _balanced(pieces, size=size, most=row_tokens)
    return [_concatenate(members) for members in rows]


def _cost(members: list[PackedSample]) -> int:
    """Count the tokens that samples with one beginning make a row compute."""
    return members[0].shared + sum(len(m.tokens) - m.shared for m in members)


def _pieces(members: list[PackedSample], size: int) -> list[list[PackedSample]]:
    """Cut samples with one beginning into pieces that fit a row of `size`, longest samples first."""
    pieces: list[list[PackedSample]] = []
    for member in sorted(members, key=lambda m: -len(m.tokens)):
        if pieces and _cost([*pieces[-1], member]) <= size:
            pieces[-1].append(member)
        else:
            pieces.append([member])
    return pieces


def _balanced(pieces: list[list[PackedSample]], *, size: int, most: int) -> list[list[PackedSample]]:
    """Lay pieces into rows, the largest first, each into the emptiest row."""
    rows: list[list[PackedSample]] = [[] for _ in range(ceil(sum(map(_cost, pieces)) / size))]
    used = [0] * len(rows)
    for piece in sorted(pieces, key=lambda p: -_cost(p)):
        cost, emptiest = _cost(piece), min(range(len(rows)), key=used.__getitem__)
        if used[emptiest] and used[emptiest] + cost > most:
            emptiest = len(rows)
            rows.append([])
            used.append(0)
        rows[emptiest] += piece
        used[emptiest] += cost
    return [row for row in rows if row]


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
