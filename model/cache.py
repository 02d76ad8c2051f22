"""State of batched decoding: window and compressed keys of every layer, rolling compressor states, one position a row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from model.config import AnyConfig
from model.layout import PackedRow
from model.rope import inverse_frequencies, rotations
from model.transfer import send

FRONT = 1
"""Keys before the window in `LayerCache.keys`: a zero key whose score is overwritten by the sink's logit."""


@dataclass
class CompressorState:
    """The tokens that the next compressed entry needs, in a ring: kv and gate [B, n, channels] fp32; n = 2m with overlap, else m."""

    kv: Tensor
    gate: Tensor


@dataclass
class LayerCache:
    """One layer's state.

    Attributes:
        keys: [B, 1 + W + entries, K] zero key, window ring (slot = position mod W), compressed entries; in V3.2 every token is an entry.
        compressor: rolling state, None without a compressor.
        index_keys: [B, entries, K'] of a layer's indexer.
        indexer: rolling state of the indexer's compressor, None without one.
    """

    keys: Tensor
    compressor: CompressorState | None = None
    index_keys: Tensor | None = None
    indexer: CompressorState | None = None


class Cache:
    """Decoding state of `rows` sequences of at most `capacity` tokens each.

    Attributes:
        layers: one `LayerCache` a layer.
        positions: [B] int64, tokens that each row has seen. Everything is stored by position, so lowering one takes tokens back.
        draft: the MTP block's, None until `drafting.prefill` makes it.
        streams: [n, B, M, D] of the newest n tokens of each row, what the MTP block reads next; kept along with `draft`.

    Source: v4_spec 2.6.
    """

    def __init__(
        self, config: AnyConfig, *, rows: int, capacity: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        self.config, self.capacity = config, capacity
        self.positions = torch.zeros(rows, dtype=torch.int64, device=device)
        self.layers = [
            layer_cache(config, r, rows=rows, capacity=capacity, device=device, dtype=dtype)
            for r in config.compress_ratios[: config.num_hidden_layers]
        ]
        self.draft: LayerCache | None = None
        self.streams: Tensor | None = None

    @property
    def rows(self) -> int:
        """Sequences in the batch."""
        return len(self.positions)

    def select(self, index: Tensor) -> Cache:
        """Return a cache whose row i is a copy of row `index[i]`: repeats a prompt's row for its samples, drops finished rows.

        Args:
            index: [B'] int64.
        """
        chosen = object.__new__(Cache)
        chosen.config, chosen.capacity = self.config, self.capacity
        chosen.positions = self.positions.index_select(0, index)
        chosen.layers = [_select(layer, index) for layer in self.layers]
        chosen.draft = self.draft and _select(self.draft, index)
        chosen.streams = None if self.streams is None else self.streams.index_select(1, index)
        return chosen


def layer_cache(config: AnyConfig, ratio: int, *, rows: int, capacity: int, device: torch.device | str, dtype: torch.dtype) -> LayerCache:
    """Make the empty state of one layer of a compress ratio; arguments as of `Cache`."""

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(rows, *shape, device=device, dtype=dtype)

    def state(width: int) -> CompressorState:
        shape = (rows, 2 * ratio, 2 * width) if ratio == 4 else (rows, ratio, width)
        return CompressorState(torch.zeros(shape, device=device), torch.full(shape, float("-inf"), device=device))

    entries = capacity // ratio if ratio else 0
    layer = LayerCache(zeros(FRONT + config.sliding_window + entries, config.key_width))
    if ratio > 1:
        layer.compressor = state(config.key_width)
    if ratio in (1, 4):
        layer.index_keys = zeros(entries, config.index_head_dim)
    if ratio == 4:
        layer.indexer = state(config.index_head_dim)
    return layer


def _select(layer: LayerCache, index: Tensor) -> LayerCache:
    def rows(state: CompressorState | None) -> CompressorState | None:
        return state and CompressorState(state.kv.index_select(0, index), state.gate.index_select(0, index))

    index_keys = None if layer.index_keys is None else layer.index_keys.index_select(0, index)
    return LayerCache(layer.keys.index_select(0, index), rows(layer.compressor), index_keys, rows(layer.indexer))


class PrefillPlan:
    """Where the tokens of a packed row go in a cache: sample i fills row i, which must be empty.

    Every place is worked out once, where `cu_seqlens` is, and sent to the cache: from the host to a GPU nothing waits for anything.
    """

    def __init__(self, row: PackedRow, cache: Cache, cu_seqlens: Tensor) -> None:
        """Plan where the row's samples go; `cu_seqlens` [N + 1] is what the row was made from."""
        cu = cu_seqlens.to(torch.int64)
        self._cu, self._lengths = cu, cu.diff()
        if len(self._lengths) != cache.rows:
            raise ValueError(f"prefill: got {len(self._lengths)} sequences for {cache.rows} cache rows, expected one a row")
        if (longest := int(self._lengths.max())) > cache.capacity:
            raise ValueError(f"prefill: got a sequence of {longest} tokens, expected at most the capacity {cache.capacity}")
        self._window, self._device = row.window, cache.positions.device
        self._tails: dict[tuple[int, int], tuple[Tensor, ...]] = {}
        self._entries: dict[tuple[int, int], tuple[Tensor, ...]] = {}

    def tail(self, count: int, *, offset: int = 0) -> tuple[Tensor, ...]:
        """Find the last `count` tokens of every sample: token, cache row, ring slot counted from `offset` on, each [n] int64."""
        if (count, offset) not in self._tails:
            kept = self._lengths.clamp(max=count)
            rows, number = _listed(kept)
            token = (self._cu[1:] - kept)[rows] + number
            self._tails[count, offset] = self._sent(token, rows, (token - self._cu[rows]) % count + offset)
        return self._tails[count, offset]

    def keep_tail(self, state: CompressorState, kv: Tensor, gate: Tensor) -> None:
        """Leave the last tokens of every sample [T, channels] in a rolling state."""
        token, rows, slot = self.tail(state.kv.shape[1])
        state.kv[rows, slot], state.gate[rows, slot] = kv[token], gate[token]

    def put_window(self, keys: Tensor, kv: Tensor) -> None:
        """Leave the last window of every sample [T, K] in the ring of `keys`."""
        token, rows, column = self.tail(self._window, offset=FRONT)
        keys[rows, column] = kv[token].to(keys.dtype)

    def put_entries(self, keys: Tensor | None, entries: Tensor, ratio: int, *, offset: int = 0) -> None:
        """Leave all compressed entries [C, K] in `keys`, from column `offset` on."""
        assert keys is not None
        if (ratio, offset) not in self._entries:
            rows, number = _listed(self._lengths // ratio)
            self._entries[ratio, offset] = self._sent(rows, number + offset)
        rows, column = self._entries[ratio, offset]
        keys[rows, column] = entries.to(keys.dtype)

    def _sent(self, *places: Tensor) -> tuple[Tensor, ...]:
        return send(torch.stack(places), self._device).unbind()


def _listed(counts: Tensor) -> tuple[Tensor, Tensor]:
    """List `counts` [N] things of each of N rows: whose each is, and which of its row's, [n] int64."""
    rows = torch.repeat_interleave(counts)
    return rows, torch.arange(len(rows), device=counts.device) - (counts.cumsum(0) - counts)[rows]


class Step:
    """What one decoding step needs in every layer, computed once: positions, rotations, visible keys, completed blocks.

    Attributes:
        position: [B] int64 of the token being decoded.
        rows: [B] int64, 0 .. B - 1.
        slot: [B] column of the token in `LayerCache.keys`.
        turns: rotations [B, R / 2] by kind of layer, see `PackedRow.turns`.
        completed: by ratio, rows [n] whose block the token completes, None when there is none.
        entry_turns: by ratio, rotations [n, R / 2] of those entries.
        longest: tokens of the longest row, this one included; most: by ratio, its entries.
    """

    def __init__(self, config: AnyConfig, positions: Tensor) -> None:
        self.position, self.window = positions, config.sliding_window
        self.rows = torch.arange(len(positions), device=positions.device)
        self.slot = FRONT + positions % max(self.window, 1)
        ratios = sorted({r for r in config.compress_ratios if r})
        frequencies = {kind: inverse_frequencies(config, compressed=kind) for kind in (False, bool(ratios))}
        self.turns = {kind: rotations(positions, f) for kind, f in frequencies.items()}
        self.longest = int(positions.max()) + 1
        self.most = {ratio: self.longest // ratio for ratio in ratios}
        self.completed: dict[int, Tensor | None] = {}
        self.entry_turns: dict[int, Tensor] = {}
        for ratio in ratios:
            rows = (positions % ratio == ratio - 1).nonzero().squeeze(1)
            self.completed[ratio] = rows if len(rows) else None
            if len(rows):
                self.entry_turns[ratio] = rotations(positions[rows] + 1 - ratio, frequencies[True])
        self.biases = {ratio: self._bias(ratio) for ratio in {0, *ratios}}

    def keys(self, ratio: int) -> int:
        """Count the key columns in use."""
        return FRONT + self.window + (self.most[ratio] if ratio else 0)

    def _bias(self, ratio: int) -> Tensor:
        """Return [B, 1, keys] fp32: 0 where the row sees the key, -inf elsewhere."""
        place = torch.arange(self.keys(ratio), device=self.position.device) - FRONT
        seen = place <= self.position.clamp(max=self.window - 1).unsqueeze(1)
        if ratio:
            entry = place - self.window
            seen = torch.where(entry >= 0, entry < ((self.position + 1) // ratio).unsqueeze(1), seen)
        return torch.zeros(seen.shape, device=seen.device).masked_fill_(~seen, float("-inf")).unsqueeze(1)

    def hide(self, scores: Tensor, ratio: int) -> Tensor:
        """Put -inf where a row has no such entry yet; `scores` [B, most]."""
        return scores + self.biases[ratio][:, 0, FRONT + self.window :]

    def selected_bias(self, ratio: int, indices: Tensor) -> Tensor:
        """Return the bias with only the selected entries [B, k] visible."""
        bias = self.biases[ratio].clone()
        begin = FRONT + self.window
        chosen = torch.full((len(indices), self.most[ratio] + 1), float("-inf"), device=bias.device)
        chosen.scatter_(1, torch.where(indices >= 0, indices, self.most[ratio]), 0.0)
        bias[:, 0, begin:] = chosen[:, :-1]
        return bias


class Steps:
    """Consecutive steps of the same rows, computed together: tokens [n * B], the first of all rows before the second of all rows.

    Attributes:
        parts: the n steps.
        turns: rotations [n * B, R / 2] by kind of layer.
    """

    def __init__(self, parts: list[Step]) -> None:
        self.parts = parts
        self.turns = {kind: torch.cat([part.turns[kind] for part in parts]) for kind in parts[0].turns}
