"""What the operations of a static decoding step share: where the rows are, and the rolling state of a compressor."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Rows(NamedTuple):
    """Where the rows of a step are.

    Attributes:
        positions: [B] int64 of the token that each row decodes.
        turns: [positions, R / 2, 2] fp32 cosines and sines of one kind of layer.
        eps: of every norm.
    """

    positions: Tensor
    turns: Tensor
    eps: float


class Pool(NamedTuple):
    """A compressor's parameters and state.

    Attributes:
        ratio: tokens an entry, m; entries of m = 4 overlap.
        ape: [m, c * K]. weight: [K] of the entry's norm.
        kv, gate: [B, n, c * K] fp32 rings, see `model.cache.CompressorState`.
        entries: [B, C, K] where completed entries go; a row's lie side by side.
    """

    ratio: int
    ape: Tensor
    weight: Tensor
    kv: Tensor
    gate: Tensor
    entries: Tensor
