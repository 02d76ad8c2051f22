"""One decoding step of a V4 over fixed buffers, in static shapes and without waiting for the host: what a CUDA graph holds."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from model.attention import Attention
from model.cache import FRONT, Cache, CompressorState, LayerCache
from model.compressor import Compressor
from model.config import ModelConfig
from model.hyper_connections import mix_in, mix_out
from model.indexer import RATIO, Indexer
from model.kernels.indexer.listed import select_entries
from model.kernels.static_decode import op
from model.kernels.static_decode.rows import Pool, Rows
from model.linear import wide_product
from model.norm import unit_norm
from model.rope import inverse_frequencies, rotate, rotations
from model.static_weights import LayerWeights, StaticWeights
from model.transformer import Transformer

PLACES = 128
"""Capacities are rounded up to a multiple of this, and of every compress ratio."""


class Shared(NamedTuple):
    """What all layers of one step share.

    Attributes:
        tokens: [B] int64, fed.
        rows: by kind of layer, see `model.layout.PackedRow.turns`.
        turns: by kind of layer, [B, R / 2] complex.
        visible: [B] int32, entries of the layers with an indexer.
        lists: by compress ratio, the keys of layers that do not select.
    """

    tokens: Tensor
    rows: dict[bool, Rows]
    turns: dict[bool, Tensor]
    visible: Tensor
    lists: dict[int, tuple[Tensor, Tensor]]


class StaticStep:
    """A model's decoding state for up to `rows` sequences of up to `capacity` tokens, and the step that advances the first of them.

    Rows whose place is full stay at their last position and overwrite it: whoever runs the steps drops them in time.

    Attributes:
        forced: [rows] int32, the token that a row is fed, -1 for the one it chose itself.
        draws: [rows] fp32 in [0, 1), decide the next choice. temperature: [1] fp32, 0 takes the most likely token.
        tokens: [rows] int32, chosen by the last step. logprobs: [rows] fp32, theirs.
        logits: [rows, V] fp32 of the last step.
        cache: the state; `positions` are those of the tokens to be fed.
        tables: by kind of layer, the rotations [capacity, R / 2, 2] fp32 of every position.
        weights: the model's, as a step reads them.
    """

    def __init__(self, model: Transformer, *, rows: int, capacity: int) -> None:
        assert isinstance(model.config, ModelConfig)
        config = self.config = model.config
        device, dtype = model.embed.weight.device, model.embed.weight.dtype
        unit = math.lcm(PLACES, *(ratio for ratio in config.compress_ratios if ratio))
        self.rows, self.capacity = rows, -(-capacity // unit) * unit
        self.model, self.weights = model, StaticWeights(model)
        self.cache = Cache(config, rows=rows, capacity=self.capacity, device=device, dtype=dtype)
        places = torch.arange(self.capacity, device=device)
        self.tables = {
            kind: torch.view_as_real(rotations(places, inverse_frequencies(config, compressed=kind)))
            for kind in {bool(r) for r in config.compress_ratios[: config.num_hidden_layers]}
        }
        self.inbox = torch.zeros(2, rows, dtype=torch.int32, device=device)
        self.outbox = torch.zeros(2, rows, dtype=torch.int32, device=device)
        self.forced, self.draws = self.inbox[0], self.inbox[1].view(torch.float32)
        self.tokens, self.logprobs = self.outbox[0], self.outbox[1].view(torch.float32)
        self.temperature = torch.zeros(1, device=device)
        self.logits = torch.zeros(rows, config.vocab_size, device=device)

    @torch.no_grad()
    def load(self, cache: Cache, source: Tensor) -> None:
        """Take over the state of a prefill: row i becomes a copy of its row `source[i]`, [B] int64."""
        count = len(source)
        for mine, theirs in zip(_tensors(self.cache), _tensors(cache), strict=True):
            into = mine[:count, : theirs.shape[1]] if theirs.ndim > 1 else mine[:count]
            torch.index_select(theirs, 0, source, out=into)

    @torch.no_grad()
    def keep(self, index: Tensor) -> None:
        """Move the rows `index` [B'] to the front, in this order."""
        for each in (*_tensors(self.cache), self.tokens):
            each[: len(index)] = each.index_select(0, index)

    @torch.no_grad()
    def run(self, count: int) -> None:
        """Feed the first `count` rows a token each and choose the next."""
        forced, positions = self.forced[:count], self.cache.positions[:count]
        tokens = torch.where(forced >= 0, forced, self.tokens[:count]).long()
        rows = {kind: Rows(positions, table, self.config.rms_norm_eps) for kind, table in self.tables.items()}
        turns = {kind: torch.view_as_complex(table.index_select(0, positions)) for kind, table in self.tables.items()}
        step = Shared(tokens, rows, turns, ((positions + 1) // RATIO).int(), {})
        streams = self.model.embed(tokens.unsqueeze(1).expand(-1, self.config.hc_mult))  # [B, M, D]
        for weights, cache in zip(self.weights.layers, self.cache.layers):
            streams = self._block(streams, weights, _first(cache, count), step)
        hidden = self.model.norm(mix_in(streams, *self.weights.merge, config=self.config)[0])
        self.logits[:count] = wide_product(hidden, self.model.head.weight)
        op.choose(self.logits[:count], self.draws[:count], self.temperature, self.tokens[:count], self.logprobs[:count])
        positions.add_(1).clamp_(max=self.capacity - 1)

    def attend(self, x: Tensor, weights: LayerWeights, cache: LayerCache, step: Shared) -> Tensor:
        """Run the attention of one layer: its normalised input [B, D] to its output [B, D]; the tokens' keys go into `cache`."""
        own: Attention = weights.block.attn
        window, rows = self.config.sliding_window, step.rows[bool(own.ratio)]
        parts = dict(zip(weights.parts, wide_product(x, weights.inputs).split(list(weights.parts.values()), 1), strict=True))
        latent = own.q_norm(parts["latent"], dtype=x.dtype)
        turns = step.turns[bool(own.ratio)].unsqueeze(1)
        q = unit_norm(own.wq_b(latent).unflatten(1, (own.heads, own.width)), own.eps, turns)
        op.put_window(parts["window"], own.kv_norm.weight, cache.keys, rows, window=window)
        if own.compressor is not None and cache.compressor is not None:
            pool = _pool(own.compressor, cache.compressor, cache.keys[:, FRONT + window :])
            op.compress(parts["kv"], parts["gate"], pool, rows)
        chosen = None
        if own.indexer is not None and cache.indexer is not None and cache.index_keys is not None:
            op.compress(parts["index_kv"], parts["index_gate"], _pool(own.indexer.compressor, cache.indexer, cache.index_keys), rows)
            if cache.index_keys.shape[1] > own.indexer.count:
                chosen = _select(own.indexer, (latent, parts["index_weights"], turns), cache.index_keys, step.visible)
        if chosen is not None or own.ratio not in step.lists:
            step.lists[own.ratio] = op.list_keys(rows.positions, cache.keys, window=window, ratio=own.ratio, chosen=chosen)
        out = op.attend(q, cache.keys.flatten(0, 1), step.lists[own.ratio], own.attn_sink)
        return own.wo_b(own.wo_a(rotate(out, turns, inverse=True).flatten(1)))

    def _block(self, streams: Tensor, weights: LayerWeights, cache: LayerCache, step: Shared) -> Tensor:
        block = weights.block
        x, post, comb, _ = mix_in(streams, block.hc_attn_fn, block.hc_attn_base, block.hc_attn_scale, config=self.config)
        streams = mix_out(self.attend(block.attn_norm(x), weights, cache, step), streams, post, comb)
        x, post, comb, _ = mix_in(streams, block.hc_ffn_fn, block.hc_ffn_base, block.hc_ffn_scale, config=self.config)
        return mix_out(self._feed_forward(block.ffn_norm(x), weights, step), streams, post, comb)

    def _feed_forward(self, x: Tensor, weights: LayerWeights, step: Shared) -> Tensor:
        moe, limit = weights.block.ffn, self.config.swiglu_limit
        indices, shares = moe.gate(x, step.tokens)[:2]
        routed = op.experts(x, indices, shares, weights.matrices, limit=limit)
        hidden = op.gate_halves(functional.linear(x, weights.shared), limit=limit)
        return torch.addmm(routed, hidden, moe.shared_experts.w2.weight.T)


def _select(indexer: Indexer, query: tuple[Tensor, Tensor, Tensor], keys: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """Choose entries [B, k] and count them; the weights' positive factor does not change the choice and is left out."""
    latent, weights, turns = query
    q = rotate(indexer.wq_b(latent).unflatten(1, (indexer.heads, indexer.width)), turns)
    return select_entries(q, keys, weights, visible, indexer.count)


def _pool(compressor: Compressor, state: CompressorState, entries: Tensor) -> Pool:
    return Pool(compressor.ratio, compressor.ape, compressor.norm.weight, state.kv, state.gate, entries)


def _states(layer: LayerCache) -> list[CompressorState]:
    return [state for state in (layer.compressor, layer.indexer) if state is not None]


def _tensors(cache: Cache) -> list[Tensor]:
    """List everything that is kept a row, rows first."""
    found = [cache.positions]
    for layer in cache.layers:
        found += [layer.keys, *(part for state in _states(layer) for part in (state.kv, state.gate))]
        found += [] if layer.index_keys is None else [layer.index_keys]
    return found


def _first(layer: LayerCache, count: int) -> LayerCache:
    """View the first rows of a layer's state."""

    def first(state: CompressorState | None) -> CompressorState | None:
        return state and CompressorState(state.kv[:count], state.gate[:count])

    index_keys = None if layer.index_keys is None else layer.index_keys[:count]
    return LayerCache(layer.keys[:count], first(layer.compressor), index_keys, first(layer.indexer))
