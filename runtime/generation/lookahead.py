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
        """Start a step that feeds these tokens, or where they are -1 what the row chose last."""

    def collect(self) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Wait for the oldest step; returns its choices and their log-probs."""

    def keep(self, index: NDArray[np.int64]) -> None:
        """Go on with these rows alone."""

    def shrinks(self, count: int, *, steps: int) -> bool:
        """Tell whether `steps` steps over so many rows are worth `keep`."""


def decode_ahead(rows: list[Row], decoder: AheadDecoder, turns: Turns) -> None:
    """Finish rows that are prompts so far; the decoder holds them in this order and has chosen their first tokens, not collected yet."""
    table = _Table(rows, turns)
    while True:
        forced = table.tell()
        if table.steps > 0:
            decoder.launch(forced, table.draws())
        table.take(*decoder.collect())
        if not table.alive.any():
            return
        if decoder.shrinks(int(table.alive.sum()), steps=table.steps):
            index = table.alive.nonzero()[0]
            decoder.keep(index)
            table.keep(index)


class _Table:
    """The rows as arrays: a row gets one token in every step, and costs the interpreter something only when its turn ends.

    Attributes:
        alive: [B] bool, rows that are not done.
        _given, _tokens, _logprobs: [steps, B]; what a row is told in each step, -1 where it samples; what it got; the log-probs thereof.
        _step: the step that is being taken, from `tell` on; the steps before are in the rows up to `_written` [B].
        _sampled, _prompt: [B] tokens sampled, with those of this step, and tokens before the first step.
    """

    def __init__(self, rows: list[Row], turns: Turns) -> None:
        self._rows, self._turns = rows, turns
        count, places = len(rows), turns.limit  # no row takes more steps than it has room for tokens
        self.alive = np.ones(count, dtype=bool)
        drawn = [row.draws for row in rows if row.draws is not None]
        self._draws = np.stack(drawn) if drawn else np.zeros((count, 1), dtype=np.float32)  # [B, max_new_tokens], [B, 1] when greedy
        self._prompt = np.array([len(row.tokens) for row in rows])
        self._sampled, self._written = np.zeros((2, count), dtype=np.int64)
        self._given = np.full((places, count), -1, dtype=np.int32)
        self._tokens, self._logprobs = np.zeros((places, count), dtype=np.int32), np.zeros((places, count), dtype=np.float32)
        self._step = -1

    @property
    def steps(self) -> int:
        """Steps that the rows may take after this one, 0 where all are done with it.

        A row that ends a turn in its last place but one goes on: it is truncated by the first token that it is told.
        """
        left = np.minimum(self._turns.sampling.max_new_tokens - self._sampled, self._turns.limit - self._lengths())
        return int(left[self.alive].max())

    def tell(self) -> NDArray[np.int32]:
        """Begin a step; returns what each row is told in it [B], -1 for its own choice."""
        self._step += 1
        given = self._given[self._step]
        self._sampled += self.alive & (given < 0)
        return given

    def draws(self) -> NDArray[np.float32]:
        """Look up the random number of each row's next sampled token."""
        number = np.minimum(self._sampled, self._draws.shape[1] - 1)
        return np.take_along_axis(self._draws, number[:, None], 1)[:, 0]

    def take(self, tokens: NDArray[np.int32], logprobs: NDArray[np.float32]) -> None:
        """Take what the rows sampled in this step, and end turns."""
        given = self._given[self._step]
        samples = given < 0
        self._tokens[self._step] = np.where(samples, tokens, given)
        self._logprobs[self._step] = np.where(samples, logprobs, 0)
        stopped = samples & (tokens == self._turns.tokenizer.eos)
        full = (self._sampled >= self._turns.sampling.max_new_tokens) | (self._lengths() >= self._turns.limit - 1)
        ended = (self.alive & (stopped | full)).nonzero()[0]
        if len(ended):
            self._end(ended, stopped)

    def keep(self, index: NDArray[np.int64]) -> None:
        """Go on with these rows alone."""
        self._rows = [self._rows[i] for i in index.tolist()]
        self.alive, self._draws, self._prompt = self.alive[index], self._draws[index], self._prompt[index]
        self._sampled, self._written = self._sampled[index], self._written[index]
        self._given, self._tokens, self._logprobs = self._given[:, index], self._tokens[:, index], self._logprobs[:, index]

    def _lengths(self) -> NDArray[np.int64]:
        """Count the tokens of the rows [B], with this step's."""
        return self._prompt + self._step + 1

    def _end(self, ended: NDArray[np.int64], stopped: NDArray[np.bool_]) -> None:
        """End the turns of these rows; those that go on are given what they are told in the next steps."""
        self._write(ended)
        rows = [self._rows[i] for i in ended.tolist()]
        for row, truncated in zip(rows, (~stopped[ended]).tolist(), strict=True):
            row.truncated = truncated
        self._turns.end(rows)
        self.alive[ended] = [not row.done for row in rows]
        for i, row in zip(ended.tolist(), rows, strict=True):
            if row.given:
                told = list(row.given)[: max(1, self._turns.limit - 1 - len(row.tokens))]  # with that many it is full, and truncated
                self._given[self._step + 1 : self._step + 1 + len(told), i] = told
                row.given.clear()

    def _write(self, ended: NDArray[np.int64]) -> None:
        """Write into these rows what they got since they were written last."""
        begun, end = self._written[ended], self._step + 1
        steps = slice(int(begun.min()), end)
        sampled = (self._given[steps, ended] < 0).T.tolist()
        tokens, logprobs = self._tokens[steps, ended].T.tolist(), self._logprobs[steps, ended].T.tolist()
        for place, (i, skip) in enumerate(zip(ended.tolist(), (begun - steps.start).tolist(), strict=True)):
            row = self._rows[i]
            row.tokens += tokens[place][skip:]
            row.sampled += sampled[place][skip:]
            row.logprobs += logprobs[place][skip:]
            row.count = int(self._sampled[i])
        self._written[ended] = end
