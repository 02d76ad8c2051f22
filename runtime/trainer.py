"""The loops' handle on all ranks: train, compare, save. It deals rows out and adds sums up; the ranks compute."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from runtime import checkpoint
from runtime.batch import Batch, split
from runtime.spec import LossSpec

if TYPE_CHECKING:
    from runtime.engine import Engine


class Group(Protocol):
    """All ranks together: actors under Ray, or one engine in this process."""

    @property
    def ranks(self) -> int:
        """Number of ranks."""

    def call(self, method: str, shares: Sequence[tuple] | None = None, **kwargs: Any) -> list[Any]:
        """Call a method on every rank, with each rank's own positional arguments."""

    def close(self) -> None:
        """End the ranks."""


class LocalGroup:
    """One rank in this process, for tests and benchmarks."""

    ranks = 1

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def call(self, method: str, shares: Sequence[tuple] | None = None, **kwargs: Any) -> list[Any]:
        """Call a method of the engine."""
        return [getattr(self._engine, method)(*(shares[0] if shares else ()), **kwargs)]

    def close(self) -> None:
        """Release the engine."""
        self._engine.close()


class Trainer:
    """Trains one model over all ranks."""

    def __init__(self, group: Group, *, workdir: Path) -> None:
        """Wrap the ranks; checkpoints go to `workdir / "checkpoints"`."""
        self.group, self.checkpoints = group, workdir / checkpoint.FOLDER
        self._publisher = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._publishing: Future[Path] | None = None

    @property
    def ranks(self) -> int:
        """Ranks that rows are dealt to."""
        return self.group.ranks

    def train_step(self, batches: Sequence[Batch], loss: LossSpec, *, lr: float, router_bias_speed: float = 0.0) -> dict[str, float]:
        """Take one optimizer step along the gradient of the mean loss over all targets of all rows.

        GPUs may still be at work on it when this returns: what is called next on the ranks comes behind it. Times of it therefore lack the
        end of the optimizer (some 10 of 220 ms on an H200), which falls into what follows.

        Returns:
            the loss's metrics: sums over targets divided by the number of targets; `targets` is that number; and the optimizer's.
        """
        denominator = float(max(1, sum(batch.target_count for batch in batches)))
        shares = [(rows, loss, denominator) for rows in split(batches, self.group.ranks)]
        parts = self.group.call("train_step", shares, lr=lr, router_bias_speed=router_bias_speed)
        sums: dict[str, float] = {}
        for part, _ in parts:
            for name, value in part.items():
                sums[name] = sums.get(name, 0.0) + value
        return {name: value / denominator for name, value in sums.items()} | {"targets": denominator} | parts[0][1]

    def logprobs(self, batches: Sequence[Batch], model: str = "") -> list[np.ndarray]:
        """Return each row's target log-probs [R] float32, nats, in the order of `batches`; `model` names a frozen one."""
        ranks = self.group.ranks
        shares = [list(batches[rank::ranks]) for rank in range(ranks)]
        for rows in shares:  # ranks move together: one that is a row short computes an emptied one
            rows += [batches[0].emptied()] * (len(shares[0]) - len(rows))
        parts = self.group.call("logprobs", [(rows, model) for rows in shares])
        return [parts[i % ranks][i // ranks] for i in range(len(batches))]

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Commit a checkpoint of `step` optimizer steps done, with the loop's own state.

        The files are written when this returns; hashing and flushing them goes on beside what follows, see `settle`.
        """
        self.settle()
        shares = self.group.ranks
        written = checkpoint.begin(
            self.checkpoints, step, write=lambda d: _ignore(self.group.call("save", [(str(d),)] * shares)), state=state
        )
        self._publishing = self._publisher.submit(checkpoint.publish, written)

    def settle(self) -> None:
        """Wait for the checkpoint that is still being committed.

        Raises:
            OSError: the disk refused it; the one before stands.
        """
        if self._publishing is not None:
            publishing, self._publishing = self._publishing, None
            publishing.result()

    def resume(self) -> dict[str, Any]:
        """Load the newest valid checkpoint; returns its loop state, `{"step": 0}` where there is none."""
        found = checkpoint.newest(self.checkpoints)
        if found is None:
            return {"step": 0}
        path, state = found
        self.group.call("load", [(str(path),)] * self.group.ranks)
        return state

    def peak_memory_gib(self) -> float:
        """Return the most memory that any rank has held, on its GPU where it has one."""
        return round(max(self.group.call("peak_memory_gib")), 3)

    def export(self, directory: Path) -> None:
        """Write model and tokenizer for the next step."""
        self.group.call("export", [(str(directory),)] * self.group.ranks)


def _ignore(_: Any) -> None:
    """Drop a value where a callback returns none."""
