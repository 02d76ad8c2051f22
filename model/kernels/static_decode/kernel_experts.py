"""The routed experts of a few tokens: (token, choice) pairs counted into the experts' order, and products that read them there."""

from __future__ import annotations

import triton
import triton.language as tl

from model.kernels.experts.kernel import swiglu


@triton.jit
def _chosen(indices, pair, pairs):
    """Load the experts of some pairs; the last one's where no expert has the number (the router's of NaN): every pair needs a place."""
    return tl.where(pair < pairs, tl.minimum(tl.load(indices + pair, pair < pairs, 0), tl.num_programs(0) - 1), 1 << 30)


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
        place += tl.sum((_chosen(indices, pair, pairs) < expert).to(tl.int32), 0)
    for start in range(0, pairs, BLOCK):
        pair = start + tl.arange(0, BLOCK)
        mine = _chosen(indices, pair, pairs) == expert
        at = place + tl.cumsum(mine.to(tl.int32), 0) - 1
        tl.store(order + at, pair.to(tl.int64), mine)
        tl.store(slots + pair, at.to(tl.int64), mine)
        place += tl.sum(mine.to(tl.int32), 0)
    tl.store(ends + expert, place)


@triton.jit
def _stretch(ends, tile, experts, ROWS: tl.constexpr, EXPERTS: tl.constexpr):
    """Return the expert of a tile of up to ROWS places, the tile's first place and the expert's end; no places beyond the last tile."""
    number = tl.arange(0, EXPERTS)
    real = number < experts
    end, begin = tl.load(ends + number, real, 0), tl.load(ends + number - 1, real & (number > 0), 0)
    tiles = (end - begin + ROWS - 1) // ROWS
    tiles = tl.where(real, tiles, 0)
    after = tl.cumsum(tiles, 0)
    expert = tl.sum((after <= tile).to(tl.int32), 0)
    mine = number == expert
    first = tl.sum(tl.where(mine, begin + (tile - after + tiles) * ROWS, 0), 0)
    return expert, first, tl.sum(tl.where(mine, end, 0), 0)


@triton.jit
def _weights(w, expert, outputs, width, column, k):
    """Load a tile of an expert's matrix [outputs, width], transposed."""
    at = w + (expert.to(tl.int64) * outputs + column)[None, :] * width + k[:, None]
    return tl.load(at, (column < outputs)[None, :] & (k < width)[:, None], 0.0)


@triton.jit
def multiply(x, order, ends, first_w, second_w, share, out, experts, width, outputs, active, limit, GATED: tl.constexpr,
             EXPERTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Multiply one tile of pairs by their expert's matrix [outputs, width].

    With GATED the rows are those of the pairs' tokens, and out = share silu(min(W1 x, l)) clamp(W3 x, -l, l); without, they lie in order.
    """
    expert, first, stop = _stretch(ends, tl.program_id(0), experts, ROWS, EXPERTS)
    if first < stop:
        place = first + tl.arange(0, ROWS)
        seen = place < stop
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        pair = tl.load(order + place, seen, 0)
        row = pair // active if GATED else place.to(tl.int64)
        gate, up = tl.zeros([ROWS, COLUMNS], tl.float32), tl.zeros([ROWS, COLUMNS], tl.float32)
        for start in tl.range(0, width, BLOCK, num_stages=STAGES):
            k = start + tl.arange(0, BLOCK)
            a = tl.load(x + row[:, None] * width + k[None, :], seen[:, None] & (k < width)[None, :], 0.0)
            gate = tl.dot(a, _weights(first_w, expert, outputs, width, column, k), gate, input_precision="ieee")
            if GATED:
                up = tl.dot(a, _weights(second_w, expert, outputs, width, column, k), up, input_precision="ieee")
        if GATED:
            gate = swiglu(gate, up, limit) * tl.load(share + pair, seen, 0.0)[:, None]
        at = out + place.to(tl.int64)[:, None] * outputs + column[None, :]
        tl.store(at, gate.to(out.dtype.element_ty), seen[:, None] & (column < outputs)[None, :])
