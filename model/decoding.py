"""Decoders that the host leads token by token: compiled loops for fp32 on a CPU, torch for what `model.graph_decoding` does not take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.cache import Cache, LayerCache
from model.config import ModelConfig
from model.indexer import RATIO
from model.kernels.decode import attention, experts, streams
from model.kernels.decode.products import LANES, map_rows, padded
from model.kernels.decode.room import attention_room, expert_room, streams_room
from model.packed_weights import LayerWeights, PackedWeights
from model.rope import inverse_frequencies, rotations
from model.transformer import Transformer

_ALL = 1 << 62
"""More entries than any row has: layers without an indexer select none."""


class Decoder(Protocol):
    """Advances the rows of one cache."""

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Give every row its next token; returns the logits [B, V] fp32 of what follows, valid until the next step.

        Raises:
            ValueError: a row is full, or there is not one token a row.
        """

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone, numbered as the steps before."""


def decoder_for(model: Transformer) -> Callable[[Cache], Decoder]:
    """Prepare the decoding of a model with the weights of this moment.

    Returns:
        what makes a decoder of a filled cache; to be thrown away when the weights change.
    """
    if not is_compiled(model):
        return lambda cache: TorchDecoder(model, cache)
    weights = PackedWeights(model)
    return lambda cache: CompiledDecoder(weights, cache)


def is_compiled(model: Transformer) -> bool:
    """Tell whether the compiled loops decode this model: V4 in fp32 on a CPU, heads of whole vectors, keys and index not quantised."""
    fits = isinstance(model.config, ModelConfig) and model.config.head_dim % LANES == 0
    fits = fits and not (model.quantization["indexer"] or model.quantization["kv"])
    return fits and all(p.device.type == "cpu" and p.dtype == torch.float32 for p in model.parameters())


class TorchDecoder:
    """`Transformer.decode`, for every model on every device.

    Dropping rows copies the cache, so they leave it when an eighth has gone; meanwhile they are fed zeros.
    """

    def __init__(self, model: Transformer, cache: Cache) -> None:
        self._model, self._cache = model, cache
        self._rows = torch.arange(cache.rows, device=cache.positions.device)

    def step(self, tokens: Sequence[int]) -> Tensor:
        """See `Decoder.step`."""
        if len(tokens) != len(self._rows):
            raise ValueError(f"decode: got {len(tokens)} tokens, expected one for each of {len(self._rows)} rows")
        if len(tokens) < self._cache.rows:
            self._drop()
        cache, device = self._cache, self._rows.device
        given = torch.tensor(tokens, device=device)
        if len(tokens) < cache.rows:
            given = torch.zeros(cache.rows, dtype=torch.int64, device=device).index_copy_(0, self._rows, given)
        hidden = self._model.decode(given, cache)
        return self._model.head(hidden if len(tokens) == cache.rows else hidden[self._rows])

    def keep(self, rows: Sequence[int]) -> None:
        """See `Decoder.keep`."""
        self._rows = self._rows[torch.tensor(rows, device=self._rows.device)]

    def _drop(self) -> None:
        """Drop the rows that left, when they are many or before one of them runs past the cache."""
        cache, count = self._cache, len(self._rows)
        if 8 * count <= 7 * cache.rows or int(cache.positions.max()) >= cache.capacity:
            self._cache, self._rows = cache.select(self._rows), torch.arange(count, device=self._rows.device)


class CompiledDecoder:
    """Compiled loops over rows, on one core; a row that leaves costs nothing, and a row's numbers do not depend on its batch."""

    def __init__(self, weights: PackedWeights, cache: Cache) -> None:
        config = self._config = weights.config
        self._weights, self._cache = weights, cache
        self._slots = np.arange(cache.rows)
        self._positions: NDArray[np.int64] = cache.positions.numpy()
        self._turns = {
            kind: _turns(cache.capacity, inverse_frequencies(config, compressed=kind)) for kind in {bool(r) for r in config.compress_ratios}
        }
        self._numbers = streams.Numbers(config.hc_sinkhorn_iters, np.float32(config.hc_eps), np.float32(config.rms_norm_eps))
        self._states = [_states(layer) for layer in cache.layers]
        wide = max(len(layer.projections.wide) for layer in weights.layers) * LANES
        self._streams = streams_room(config, cache.rows)
        self._buffers = attention_room(config, cache.rows, capacity=cache.capacity, wide=wide)
        self._experts = expert_room(config, cache.rows)
        self._logits = np.zeros((cache.rows, padded(config.vocab_size)), np.float32)
        self._how = np.float32(config.swiglu_limit), np.float32(config.routed_scaling_factor), config.norm_topk_prob

    def step(self, tokens: Sequence[int]) -> Tensor:
        """See `Decoder.step`."""
        slots, count, cache = self._slots, len(tokens), self._cache
        if count != len(slots):
            raise ValueError(f"decode: got {count} tokens, expected one for each of {len(slots)} rows")
        rows = attention.Rows(slots, self._positions[slots], np.array(tokens, dtype=np.int64))
        longest = int(rows.positions.max()) + 1
        if longest > cache.capacity:
            raise ValueError(f"decode: got a row of {longest} tokens, expected at most the capacity {cache.capacity}")
        if not 0 <= min(tokens) <= max(tokens) < len(self._weights.embed):
            raise ValueError(f"decode: got tokens {min(tokens)} to {max(tokens)}, expected 0 to {len(self._weights.embed) - 1}")
        work = self._streams
        streams.embed(self._weights.embed, rows.tokens, work)
        for layer, state in zip(self._weights.layers, self._states):
            streams.enter(work, layer.attn, self._numbers, count)
            self._attend(work.x, layer, state, rows)
            streams.leave(work, self._buffers.out, count)
            work = work._replace(now=work.then, then=work.now)
            streams.enter(work, layer.ffn, self._numbers, count)
            experts.moe(work.x, layer.experts, (self._experts, self._buffers.out), rows, self._how)
            streams.leave(work, self._buffers.out, count)
            work = work._replace(now=work.then, then=work.now)
        self._positions[slots] += 1
        streams.merge(work, self._weights.merge, self._numbers, count)
        map_rows(work.x, self._weights.head, self._logits, count)
        return torch.from_numpy(self._logits[:count, : self._config.vocab_size])

    def keep(self, rows: Sequence[int]) -> None:
        """See `Decoder.keep`."""
        self._slots = self._slots[np.array(rows, dtype=np.int64)]

    def _attend(self, x: NDArray[np.float32], layer: LayerWeights, state: _States, rows: attention.Rows) -> None:
        buffers, eps, count = self._buffers, self._numbers.norm_eps, len(rows.slots)
        turns, window, topk = self._turns[bool(layer.ratio)], self._config.sliding_window, _ALL
        attention.project(x, layer.projections, buffers, eps, count)
        attention.put_window(layer.projections, buffers, state.keys, rows, (turns, window, eps))
        if layer.compressor is not None:
            attention.compress(layer.compressor, buffers, state.compressor, rows, (turns, eps))
        if layer.index_compressor is not None:
            attention.compress(layer.index_compressor, buffers, state.indexer, rows, (turns, eps))
            topk = self._config.index_topk
            if (int(rows.positions.max()) + 1) // RATIO > topk:
                map_rows(buffers.latent, layer.index_wq_b, buffers.index_q, count)
        around = (turns, window, layer.ratio, topk, layer.weights_at, self._config.index_n_heads, eps)
        attention.attend(buffers, (state.keys, state.index_keys), layer.projections.sink, rows, around)
        attention.output(layer.projections, buffers, count)


class _States(NamedTuple):
    """Views of one layer's cache: what `attention.compress` takes, twice, and the keys."""

    keys: NDArray[np.float32]
    index_keys: NDArray[np.float32]
    compressor: tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]] | None
    indexer: tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]] | None


def _states(layer: LayerCache) -> _States:
    keys = layer.keys.numpy()
    index_keys = keys if layer.index_keys is None else layer.index_keys.numpy()
    compressor, indexer = (
        None if state is None else (state.kv.numpy(), state.gate.numpy(), into)
        for state, into in ((layer.compressor, keys), (layer.indexer, index_keys))
    )
    return _States(keys, index_keys, compressor, indexer)


def _turns(positions: int, frequencies: Tensor) -> NDArray[np.float32]:
    """Return cosines and sines [positions, R / 2, 2], the same numbers as in training."""
    return torch.view_as_real(rotations(torch.arange(positions), frequencies)).numpy()
