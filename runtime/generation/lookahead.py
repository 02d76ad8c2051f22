"""Decoding with a GPU that never waits for the host: a step is launched before the results of the one before are looked at.

What a step is fed is known without them. A row that samples is fed its own choice, which stays on the GPU; a row that is being told
something is fed the next given token; a row whose turn just ended is fed its last token in any case. So what is sampled does not depend
on looking late; a row that is done is only computed once more for nothing.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from runtime.generation.rows import Row, Turns


class AheadDecoder(Protocol):
    """What `model.graph_decoding.GraphDecoder` does."""

    def launch(self, forced: NDArray[np.int32], draws: NDArray[np.float32]) -> None:
        """Start a step."""

    def collect(self) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Wait for the oldest step; returns tokens and log-probs."""

    def keep(self, index: NDArray[np.int64]) -> None:
        """Go on with these rows alone."""

    def shrinks(self, count: int, *, steps: int) -> bool:
        """Tell whether `steps` steps over so many rows are worth `keep`."""


def decode_ahead(rows: list[Row], decoder: AheadDecoder, turns: Turns) -> None:
    """Finish rows that have their first tokens already; the decoder holds them in this order, those tokens not fed yet."""
    table = _Table(rows, turns)
    if not table.alive.any():
        return
    forced = np.array([row.tokens[-1] for row in rows], dtype=np.int32)
    decoder.launch(forced, table.draws())
    while True:
        table.choose_sides()
        forced = table.tell()
        decoder.launch(forced, table.draws())
        table.take(*decoder.collect())
        if not table.alive.any():
            return
        if decoder.shrinks(int(table.alive.sum()), steps=table.steps):
            index = table.alive.nonzero()[0]
            decoder.keep(index)
            table.keep(index)


class _Table:
    """The rows as arrays, so that a row costs the interpreter nothing in a step in which it only samples.

    Attributes:
        alive: [B] bool, rows that are not done.
    """

    def __init__(self, rows: list[Row], turns: Turns) -> None:
        self._rows, self._turns = rows, turns
        count = len(rows)
        self.alive = np.array([not row.done for row in rows])
        self._samples = self.alive.copy()
        self._draws = np.array([row.draws or [0.0] for row in rows], dtype=np.float32)  # [B, max_new_tokens], [B, 1] when greedy
        self._sampled = np.array([len(row.sampled) for row in rows])
        self._room = np.array([self._room_of(row) for row in rows])
        self._since = np.zeros(count, dtype=np.int64)
        self._tokens = np.zeros((turns.limit, count), dtype=np.int32)  # no row takes more steps than it has room for tokens
        self._logprobs = np.zeros(self._tokens.shape, dtype=np.float32)
        self._now = 0
        self._ended: list[int] = []

    @property
    def steps(self) -> int:
        """Steps that the rows may still take."""
        return int(self._room[self.alive].max())

    def draws(self) -> NDArray[np.float32]:
        """Look up the random number of each row's next sampled token."""
        number = np.minimum(self._sampled, self._draws.shape[1] - 1)
        return np.take_along_axis(self._draws, number[:, None], 1)[:, 0]

    def choose_sides(self) -> None:
        """Decide which rows take what they sample in this step; the others are told something or are done."""
        self._samples = self.alive & np.array([not row.given for row in self._rows])
        self._sampled += self._samples
        self._room -= self._samples

    def tell(self) -> NDArray[np.int32]:
        """Give a token to each row that is being told something; returns what to feed, -1 for a row's own choice."""
        forced = np.full(len(self._rows), -1, dtype=np.int32)
        for i in (self.alive & ~self._samples).nonzero()[0].tolist():
            row = self._rows[i]
            forced[i] = row.given.popleft()
            row.tokens.append(int(forced[i]))
            self._since[i] = self._now + 1
            self._room[i] = self._room_of(row)
            if len(row.tokens) >= self._turns.limit - 1:
                row.truncated = True
                self._ended.append(i)
        return forced

    def take(self, tokens: NDArray[np.int32], logprobs: NDArray[np.float32]) -> None:
        """Take what the rows sampled in the step that was launched before the last one, and end turns."""
        self._tokens[self._now], self._logprobs[self._now] = tokens, logprobs
        self._now += 1
        stopped = tokens == self._turns.tokenizer.eos
        for i in (self._samples & (stopped | (self._room <= 0))).nonzero()[0].tolist():
            self._write(i)
            self._rows[i].truncated = not stopped[i]
            self._ended.append(i)
        if self._ended:
            self._end(sorted(self._ended))
            self._ended = []

    def keep(self, index: NDArray[np.int64]) -> None:
        """Go on with these rows alone."""
        self._rows = [self._rows[i] for i in index.tolist()]
        self.alive, self._samples, self._draws = self.alive[index], self._samples[index], self._draws[index]
        self._sampled, self._room, self._since = self._sampled[index], self._room[index], self._since[index]
        self._tokens, self._logprobs = self._tokens[:, index], self._logprobs[:, index]

    def _end(self, ended: list[int]) -> None:
        self._turns.end([self._rows[i] for i in ended])
        for i in ended:
            self.alive[i] = not self._rows[i].done

    def _write(self, i: int) -> None:
        """Write what row i sampled since its turn began into it."""
        row, since = self._rows[i], int(self._since[i])
        tokens = self._tokens[since : self._now, i].tolist()
        row.sampled.extend(range(len(row.tokens), len(row.tokens) + len(tokens)))
        row.tokens.extend(tokens)
        row.logprobs.extend(self._logprobs[since : self._now, i].tolist())
        self._since[i] = self._now

    def _room_of(self, row: Row) -> int:
        """Count the tokens that the row may sample before it is truncated."""
        return min(self._turns.sampling.max_new_tokens - len(row.sampled), self._turns.limit - 1 - len(row.tokens))
