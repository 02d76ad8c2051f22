"""Decoding on a GPU with one CUDA graph a step: rows in fixed places, results that the host may take a step later."""

from __future__ import annotations

import logging
import time
from collections import deque
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.cache import Cache
from model.config import ModelConfig
from model.kernels.choice import implementation_for
from model.static_step import StaticStep
from model.transfer import send
from model.transformer import Transformer

logger = logging.getLogger(__name__)
SIZES = (16, 32, 64, 128, 256, 384, 512, 768, 1024)
"""Numbers of rows that graphs are captured for; beyond the last, multiples of it."""
WORTH = 32
"""Steps to come for which a graph is captured: it serves later calls too, so it need not pay for itself in one."""
STREAMS = 4
"""Residual streams that the kernels of hyper-connections are written for."""
LEAST_WIDTH = 16
"""Channels of the narrowest heads that the kernels of attention multiply."""
SPARE = 2
"""Buffers grow to the most rows and the most tokens seen, unless that is more than so many times the places that one call needed."""


def hindrance(model: Transformer) -> str:
    """Say why no CUDA graph decodes this model; empty where one does: V4 with Triton on a GPU, parameters whole and at rest."""
    config, parameters = model.config, list(model.parameters())
    width = config.head_dim if isinstance(config, ModelConfig) else 0
    fits = config.hc_mult == STREAMS and width >= LEAST_WIDTH and width & (width - 1) == 0
    reasons = {
        f"no V4 with {STREAMS} residual streams and heads of a power of two of at least {LEAST_WIDTH} channels": not fits,
        "index or keys are quantised": model.quantization["indexer"] or model.quantization["kv"],
        "ZeRO 3 gathers the parameters into new memory for every call": any(hasattr(p, "ds_id") for p in parameters),
        "the model is not on a GPU": not all(p.is_cuda for p in parameters),
        "the kernels are the reference's": implementation_for(parameters[0]) != "triton",
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


class GraphDecoder:
    """Advances the rows of one prefill after the other; buffers and graphs stay.

    A step is launched with what it needs from the host and its results are collected later, in order: the host looks at one step while
    the next one runs. On a CPU a step runs at once, without a graph.
    """

    def __init__(self, model: Transformer) -> None:
        self._model = model
        self._step: StaticStep | None = None
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._count = 0
        self._slots: deque[_Slot] = deque()
        self._pending: deque[_Pending] = deque()
        self._memory: Any = None

    def start(self, cache: Cache, source: Tensor, *, temperature: float) -> None:
        """Begin with rows that are copies of a prefill's: row i of its row `source[i]`, [B] int64; temperature 0 is greedy."""
        while self._pending:  # steps that nobody collected
            self._pending.popleft().slot.wait()
        step = self._prepared(len(source), cache.capacity)
        step.weights.refresh()
        step.load(cache, source)
        step.temperature.fill_(temperature)
        self._count = len(source)

    @property
    def size(self) -> int:
        """Places that a step computes."""
        return _size(self._count)

    def enter(self, tokens: Tensor, logprobs: Tensor) -> None:
        """Take the rows' first choices [B] and their log-probs [B], which nobody waits for: they are fed, and collected, like a step's."""
        step = self._step
        assert step is not None and len(tokens) == self._count
        step.tokens[: self._count], step.logprobs[: self._count] = tokens, logprobs
        self._send_back(step, self._next_slot())

    def launch(self, forced: NDArray[np.int32], draws: NDArray[np.float32]) -> None:
        """Start a step.

        Args:
            forced: [B] int32, tokens to feed; -1 feeds what the row chose in the step before.
            draws: [B] fp32 in [0, 1), for choosing the next token.
        """
        step, count = self._step, self._count
        assert step is not None and len(forced) == len(draws) == count
        slot = self._next_slot()
        slot.forced[:count], slot.draws[:count] = forced, draws
        step.inbox.copy_(slot.inbox, non_blocking=True)
        self._run(step, self.size)
        self._send_back(step, slot)

    def collect(self) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Wait for the oldest step and return its choices [B] and their log-probs [B], nats, of the rows that are still there."""
        oldest = self._pending.popleft()
        oldest.slot.wait()
        tokens, logprobs = oldest.slot.tokens[: oldest.count].copy(), oldest.slot.logprobs[: oldest.count].copy()
        for index in oldest.kept:
            tokens, logprobs = tokens[index], logprobs[index]
        return tokens, logprobs

    def keep(self, index: NDArray[np.int64]) -> None:
        """Go on with these rows alone, moved to the front in this order."""
        step = self._step
        assert step is not None
        step.keep(send(torch.from_numpy(index), step.inbox.device))
        self._count = len(index)
        for pending in self._pending:
            pending.kept.append(index)

    def shrinks(self, count: int, *, steps: int) -> bool:
        """Tell whether steps over `count` rows would be smaller ones, and `steps` of them worth what that takes."""
        size = _size(count)
        return size < self.size and (steps >= WORTH or size in self._graphs)

    def _prepared(self, rows: int, capacity: int) -> StaticStep:
        """Return buffers of at least this size, the old ones where they do and no parameter has moved."""
        old, rows = self._step, _size(rows)
        if old is not None and old.rows >= rows and old.capacity >= capacity and not old.weights.has_moved():
            return old
        if old is not None:
            most, longest = max(rows, old.rows), max(capacity, old.capacity)
            if most * longest <= SPARE * max(rows * capacity, old.rows * old.capacity):
                rows, capacity = most, longest
        old = self._step = None  # the old buffers go before the new ones come
        self._graphs = {}
        before = torch.cuda.memory_allocated()
        with torch.inference_mode(False):  # the buffers may be written in any mode later
            self._step = StaticStep(self._model, rows=rows, capacity=capacity)
        held = (torch.cuda.memory_allocated() - before) / 2**30
        logger.info("decoding keeps %.2f GiB for %d rows of up to %d tokens", held, rows, self._step.capacity)
        self._slots = deque(_Slot(self._step) for _ in range(2))
        self._memory = torch.cuda.graph_pool_handle() if self._step.inbox.is_cuda else None
        return self._step

    def _next_slot(self) -> _Slot:
        assert len(self._pending) < len(self._slots)
        self._slots.rotate(-1)
        return self._slots[-1]

    def _send_back(self, step: StaticStep, slot: _Slot) -> None:
        """Let the choices follow what was launched, on their way to whoever collects them."""
        slot.outbox.copy_(step.outbox, non_blocking=True)
        slot.mark()
        self._pending.append(_Pending(slot, self._count))

    def _run(self, step: StaticStep, size: int) -> None:
        if not step.inbox.is_cuda:
            step.run(size)
            return
        if size not in self._graphs:
            self._graphs[size] = self._capture(step, size)
        self._graphs[size].replay()

    def _capture(self, step: StaticStep, size: int) -> torch.cuda.CUDAGraph:
        """Run a step once, which compiles its kernels, take it back, and record it."""
        began = time.perf_counter()
        kept = step.cache.positions.clone(), step.outbox.clone()
        step.run(size)
        # All state is stored by position: a step that is run again overwrites what it wrote.
        step.cache.positions.copy_(kept[0])
        step.outbox.copy_(kept[1])
        graph = torch.cuda.CUDAGraph()
        # What other threads ask of the GPU meanwhile, such as NCCL's watchdog about its events, must not end the capture.
        with torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"):
            step.run(size)
        logger.info("decoding %d rows of up to %d tokens: captured in %.2f s", size, step.capacity, time.perf_counter() - began)
        return graph


class _Slot:
    """Pinned memory of one step: what the host sends and what it gets back."""

    def __init__(self, step: StaticStep) -> None:
        on_gpu = step.inbox.is_cuda
        self.inbox, self.outbox = (torch.zeros(2, step.rows, dtype=torch.int32, pin_memory=on_gpu) for _ in range(2))
        self.forced, self.draws = self.inbox[0].numpy(), self.inbox[1].numpy().view(np.float32)
        self.tokens, self.logprobs = self.outbox[0].numpy(), self.outbox[1].numpy().view(np.float32)
        self._event = torch.cuda.Event() if on_gpu else None

    def mark(self) -> None:
        """Note the place in the stream after which the results are there."""
        if self._event is not None:
            self._event.record()

    def wait(self) -> None:
        """Wait for the results."""
        if self._event is not None:
            self._event.synchronize()


class _Pending:
    """A step that was launched over `count` rows, and the rows kept since."""

    def __init__(self, slot: _Slot, count: int) -> None:
        self.slot, self.count, self.kept = slot, count, list[NDArray[np.int64]]()


def _size(count: int) -> int:
    """Return the least size of `SIZES` that holds `count` rows."""
    for size in SIZES:
        if size >= count:
            return size
    return -(-count // SIZES[-1]) * SIZES[-1]
