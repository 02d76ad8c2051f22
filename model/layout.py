"""Everything about one packed row that does not depend on the layer: samples, positions, query blocks, compressed entries."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from model.config import AnyConfig
from model.rope import inverse_frequencies, rotations
from model.transfer import send

QUERY_BLOCK = 32
"""Queries that share one block of keys; small wastes arithmetic less, large wastes calls less (measured on a CPU)."""


@dataclass
class Entries:
    """The compressed entries of a packed row for one compress ratio m; C entries over all samples, in order.

    Attributes:
        ratio: m, tokens an entry.
        cu: [N + 1] int64, entries before each sample.
        tokens: [C, m] int64, the tokens of each entry.
        computed: [C * m] int64, where those tokens stand among the computed ones, see `PackedRow.source`.
        first: [C] bool, the entry is its sample's first.
        turns: [C, R / 2] complex64, rotation at the entry's first token.
        base: [T] int64, entries before the sample of each token.
        visible: [T] int64, complete entries of its own sample that a token sees.
        start: [blocks] int64, first entry that a query block may see.
        width: most entries that a query block may see.
        most: most entries of one sample.
    """

    ratio: int
    cu: Tensor
    tokens: Tensor
    computed: Tensor
    first: Tensor
    turns: Tensor
    base: Tensor
    visible: Tensor
    start: Tensor
    width: int
    most: int


class PackedRow:
    """The layout of one packed row of N samples and T tokens.

    Samples that begin alike may share those tokens: a token sees only what is before it in its sample, so the same beginning has the same
    states. Then only U <= T tokens are computed, and the T tokens are spread from them where tokens meet each other: in attention.

    Attributes:
        source: [T] int64, the computed token that each token equals; None when all are computed (U = T).
        origin: [U] int64, one token of the row for each computed one.
        indexer: how the indexers go along: "" selects; "dense" lets every query see all its entries, so that an untrained indexer can learn
            from them; "sparse" selects and learns from the selected ones.
        indexer_losses: filled by the layers where `indexer` is not "", one [] fp32 tensor each.
        cu_seqlens: [N + 1] int64.
        sample, position: [T] int64, which sample a token belongs to and where in it.
        entries: compressed entries by compress ratio.
        turns: rotations [U, R / 2] of sliding-window layers (False) and of layers that compress (True).
        block, blocks: queries a block, and how many blocks cover the row; the last may be partly empty.
    """

    def __init__(
        self,
        config: AnyConfig,
        cu_seqlens: Tensor,
        length: int,
        source: Tensor | None = None,
        *,
        indexer: str = "",
        device: torch.device | None = None,
    ) -> None:
        """Lay a row out where `cu_seqlens` is, and put the layout on `device`: from the host to a GPU nothing waits for anything."""
        cu, here = cu_seqlens.to(torch.int64), cu_seqlens.device
        self._device = here if device is None else device
        lengths = cu.diff()
        if int(cu[0]) != 0 or int(cu[-1]) != length or bool((lengths <= 0).any()):
            raise ValueError(
                f"cu_seqlens: got {cu.tolist()[:8]}... for {length} tokens, expected an increasing list from 0 to the token count"
            )
        self.cu_seqlens, self.length, self.lengths = cu, length, lengths
        self.window = config.sliding_window
        self.sample = torch.repeat_interleave(torch.arange(len(lengths), device=here), lengths, output_size=length)
        self.position = torch.arange(length, device=here) - cu[self.sample]
        self.indexer, self.indexer_losses = indexer, list[Tensor]()
        self.source = source
        self.origin = None if source is None else _origins(source)
        self.block = min(QUERY_BLOCK, -(-length // 8) * 8)
        self.blocks = -(-length // self.block)
        self.reach = -(-self.window // self.block) * self.block
        """Keys before a query block that its window may reach, a whole number of blocks."""
        self.live = self._live_blocks()
        """[n] query blocks that somebody reads, where samples share tokens: the others repeat tokens computed elsewhere. None for all."""
        ratios = sorted({r for r in config.compress_ratios if r})
        frequencies = {kind: inverse_frequencies(config, compressed=kind) for kind in (False, True)}
        places = send(self.gather(self.position), self._device)
        self.turns = {kind: rotations(places, f) for kind, f in frequencies.items() if kind in (False, bool(ratios))}
        self.entries = {ratio: self._entries(ratio, frequencies[True]) for ratio in ratios}
        self._biases: dict[tuple[int, int], Tensor] = {}
        for name in ("cu_seqlens", "lengths", "sample", "position", "source", "origin", "live"):
            value = getattr(self, name)
            setattr(self, name, None if value is None else send(value, self._device))

    def spread(self, x: Tensor) -> Tensor:
        """Give every token of the row its state: [U, ...] to [T, ...]."""
        return x if self.source is None else x.index_select(0, self.source)

    def gather(self, x: Tensor) -> Tensor:
        """Keep one token's state for each computed token: [T, ...] to [U, ...]."""
        return x if self.origin is None else x.index_select(0, self.origin)

    def _live_blocks(self) -> Tensor | None:
        if self.origin is None or self.indexer:
            return None
        live = torch.unique(self.origin // self.block)
        return live if len(live) < self.blocks else None

    def among(self, first: int, last: int, *, live: bool) -> Tensor:
        """Number the query blocks [first, last) of all, or of the live ones: [last - first] int64."""
        if live and self.live is not None:
            return self.live[first:last]
        return torch.arange(first, last, device=self.cu_seqlens.device)

    def _entries(self, ratio: int, frequencies: Tensor) -> Entries:
        device = self.cu_seqlens.device
        counts = self.lengths // ratio
        cu = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        total = int(cu[-1])
        owner = torch.repeat_interleave(torch.arange(len(counts), device=device), counts, output_size=total)
        number = torch.arange(total, device=device) - cu[owner]
        tokens = (self.cu_seqlens[owner] + number * ratio).unsqueeze(1) + torch.arange(ratio, device=device)
        ends = torch.arange(1, self.blocks + 1, device=device) * self.block
        start = cu[self.sample[ends - self.block]]
        last = (ends - 1).clamp(max=self.length - 1)
        base, visible = cu[self.sample], (self.position + 1) // ratio
        stop = base[last] + visible[last]  # no query of the block sees more
        computed = tokens.flatten() if self.source is None else self.source[tokens.flatten()]
        places = {"cu": cu, "tokens": tokens, "computed": computed, "first": number == 0, "base": base, "visible": visible, "start": start}
        return Entries(
            ratio=ratio,
            turns=rotations(send(number * ratio, self._device), frequencies),
            width=int((stop - start).max()),
            most=int(counts.max()),
            **{name: send(place, self._device) for name, place in places.items()},
        )

    def padded(self, x: Tensor, value: float = 0) -> Tensor:
        """Extend `x` [T, ...] with rows of `value` to a whole number of query blocks, as [blocks, block, ...]."""
        missing = self.blocks * self.block - self.length
        if missing:
            x = torch.cat([x, x.new_full((missing, *x.shape[1:]), value)])
        return x.view(self.blocks, self.block, *x.shape[1:])

    def keys(self, ratio: int) -> int:
        """Count the key columns of a query block: window, compressed entries, the sink, and padding to a multiple of 8."""
        width = self.entries[ratio].width if ratio else 0
        return -(-(self.reach + self.block + width + 1) // 8) * 8

    def bias(self, ratio: int, first: int, last: int, *, live: bool = False) -> Tensor:
        """Return what is added to the scores of query blocks [first, last), of all or of the live ones, when every entry is visible.

        Returns:
            [last - first, block, keys] fp32, 0 where the query sees the key, -inf elsewhere and in the sink's column.
        """
        live = live and self.live is not None
        key = (ratio, last if live else -last)
        if first or key not in self._biases:
            bias = self._make_bias(ratio, self.among(first, last, live=live))
            if first or last != (len(self.live) if live and self.live is not None else self.blocks):
                return bias
            self._biases[key] = bias
        return self._biases[key]

    def _make_bias(self, ratio: int, blocks: Tensor) -> Tensor:
        device = self.cu_seqlens.device
        bias = torch.full((len(blocks), self.block, self.keys(ratio)), float("-inf"), device=device)
        query = (blocks.unsqueeze(1) * self.block + torch.arange(self.block, device=device)).flatten()
        token = query.clamp(max=self.length - 1)
        lowest = torch.maximum(query - self.window + 1, self.cu_seqlens[self.sample[token]]).view(-1, self.block, 1)
        starts = blocks * self.block - self.reach
        key = starts.view(-1, 1, 1) + torch.arange(self.reach + self.block, device=device)
        seen = (key >= lowest) & (key <= query.view(-1, self.block, 1))
        bias[:, :, : self.reach + self.block].masked_fill_(seen, 0)
        if ratio:
            entries = self.entries[ratio]
            low = entries.base[token].view(-1, self.block, 1)
            high = low + entries.visible[token].view(-1, self.block, 1)
            entry = entries.start[blocks].view(-1, 1, 1) + torch.arange(entries.width, device=device)
            begin = self.reach + self.block
            bias[:, :, begin : begin + entries.width].masked_fill_((entry >= low) & (entry < high), 0)
        return bias

    def selected_bias(self, ratio: int, indices: Tensor, *, first: int, last: int, live: bool = False) -> Tensor:
        """Return `bias` with only the selected compressed entries visible.

        Args:
            ratio: compress ratio of the layer.
            indices: [T, k] int64 local entry numbers, -1 for none.
            first, last: range of query blocks, of all or of the live ones.

        Returns:
            [last - first, block, keys] fp32.
        """
        entries, begin = self.entries[ratio], self.reach + self.block
        bias, blocks = self.bias(ratio, first, last, live=live).clone(), self.among(first, last, live=live)
        rows = self.padded(indices, -1)[blocks]
        offset = self.padded(entries.base)[blocks] - entries.start[blocks].unsqueeze(1)
        spare = entries.width
        column = torch.where(rows >= 0, rows + offset.unsqueeze(-1), spare)
        chosen = torch.full((*rows.shape[:2], spare + 1), float("-inf"), device=bias.device)
        chosen.scatter_(2, column, 0.0)
        bias[:, :, begin : begin + spare] = chosen[:, :, :spare]
        return bias

    def entry_rows(self, ratio: int, first: int, last: int, *, live: bool = False) -> Tensor:
        """Return the entries that query blocks gather, chosen as in `bias`: [last - first, width] int64, clamped into range."""
        entries = self.entries[ratio]
        rows = entries.start[self.among(first, last, live=live)].unsqueeze(1) + torch.arange(entries.width, device=entries.start.device)
        return rows.clamp(max=max(len(entries.first) - 1, 0))


def _origins(source: Tensor) -> Tensor:
    """Find the first token that each computed token stands for; `source` [T] names every number from 0 to its maximum."""
    places = torch.arange(len(source), device=source.device)
    first = places.new_full((int(source.max()) + 1,), len(source)).scatter_reduce_(0, source, places, "amin")
    if int(first.max()) == len(source):
        raise ValueError(f"source: no token names {int((first == len(source)).nonzero()[0])}, expected every number up to {len(first) - 1}")
    return first
