"""Bringing the (token, choice) pairs of a decoding step into the experts' order, by counting."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def group(indices, order, slots, ends, pairs, BLOCK: tl.constexpr):
    """Put the pairs of this program's expert behind those of the experts before it, in their order.

    Args:
        indices: [N] int64, each pair's expert.
        order: [N] int64 out, the pair in each place. slots: [N] int64 out, the place of each pair. ends: [E] int32 out.
    """
    expert = tl.program_id(0)
    place = 0
    for start in range(0, pairs, BLOCK):
        pair = start + tl.arange(0, BLOCK)
        place += tl.sum((tl.load(indices + pair, pair < pairs, 1 << 30) < expert).to(tl.int32), 0)
    for start in range(0, pairs, BLOCK):
        pair = start + tl.arange(0, BLOCK)
        mine = tl.load(indices + pair, pair < pairs, 1 << 30) == expert
        at = place + tl.cumsum(mine.to(tl.int32), 0) - 1
        tl.store(order + at, pair.to(tl.int64), mine)
        tl.store(slots + pair, at.to(tl.int64), mine)
        place += tl.sum(mine.to(tl.int32), 0)
    tl.store(ends + expert, place)
