"""Sparse attention's forward on Hopper, for 512 channels and heads in 64s: one warpgroup copies, two multiply.

Keys come in pairs of tiles of 64. Each of the two has the scores of one tile of a pair and half of the value channels; they agree on the
running maximum and hand each other their weights through shared memory. A tile is both operands, transposed for the scores and plain for
the values; the copying warpgroup gathers the rows of the next tiles, of the next query too, into two buffers as they come free.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

LOG2E = gl.constexpr(1.4426950408889634)
WIDTH = gl.constexpr(512)
TILE = gl.constexpr(64)
PIECE = gl.constexpr(128)
"""Channels in one piece of shared memory; a row has four."""
NONE, RANGE, GATHERED = gl.constexpr(0), gl.constexpr(1), gl.constexpr(2)
READY, FREE, MAXIMUM, WEIGHTS = gl.constexpr(0), gl.constexpr(2), gl.constexpr(4), gl.constexpr(6)
MASS, QUERIES_READY, QUERIES_FREE = gl.constexpr(8), gl.constexpr(10), gl.constexpr(11)
"""Where the barriers stand: two of each of the first five."""

copy = async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared
"""What Triton 3.6 calls otherwise than 3.9."""


@gluon.jit
def slots_of(position, count, t, window: gl.constexpr, kind: gl.constexpr):
    """Return the first slot that a query sees, and one past its last: what is between it sees. Slots: window, oldest first; then pool."""
    first = gl.maximum(window - 1 - gl.load(position + t).to(gl.int32), 0)
    last = window
    if kind != NONE:
        last = window + gl.load(count + t).to(gl.int32)
    return first, last


@gluon.jit
def listed_rows(rows, base, t, slot, first, last, offset, window: gl.constexpr, k, kind: gl.constexpr):
    """Return the rows of keys in the slots of a query, the pool's from `offset` on; row t for slots that it does not see."""
    row = t - window + 1 + slot
    if kind == GATHERED:
        number = gl.load(rows + t.to(gl.int64) * k + slot - window, mask=(slot >= window) & (slot < last), other=0)
        row = gl.where(slot < window, row, offset + number)
    elif kind == RANGE:
        row = gl.where(slot < window, row, offset + gl.load(base + t).to(gl.int32) + slot - window)
    return gl.where((slot >= first) & (slot < last), row, t)


@gluon.jit
def copy_rows(target, start, x, row, layout: gl.constexpr):
    """Start copying rows of `x` [*, 512] to four pieces of shared memory, from piece `start` on."""
    channel = gl.arange(0, PIECE, layout=gl.SliceLayout(0, layout))
    place = x + row.to(gl.int64)[:, None] * WIDTH + channel[None, :]
    for piece in gl.static_range(4):
        copy(target.index(start + piece), place + piece * PIECE)


@gluon.jit
def power_of_two(x):
    """Raise two to a power, to zero what is denormal."""
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def hidden_zero(x):
    """Return 0 that the compiler does not know: addresses made from it inside a loop are not kept in registers outside."""
    return gl.inline_asm_elementwise("mov.u32 $0, 0;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _copy(
    q, keys, rows, position, base, count, tokens, offset, total, queries, tiles, bars,
    heads: gl.constexpr, window: gl.constexpr, k, kind: gl.constexpr,
):  # fmt: skip
    """Fill the buffers, query after query, as they come free."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    index = gl.arange(0, TILE, layout=gl.SliceLayout(1, layout))
    even = 0
    odd = 0
    turn = 0
    for item in range(gl.program_id(0), total, gl.num_programs(0)):
        t = tokens - 1 - item // (heads // TILE)
        first, last = slots_of(position, count, t, window, kind)
        begin = first // TILE
        end = (last + TILE - 1) // TILE
        row = listed_rows(rows, base, t, begin * TILE + index, first, last, offset, window, k, kind)
        other = listed_rows(rows, base, t, begin * TILE + TILE + index, first, last, offset, window, k, kind)
        mbarrier.wait(bars.index(QUERIES_FREE), (turn & 1) ^ 1)
        copy_rows(queries, 0, q, t * heads + item % (heads // TILE) * TILE + index, layout)
        async_copy.mbarrier_arrive(bars.index(QUERIES_READY), increment_count=False)
        turn = turn + 1
        for j in range(begin, end, 2):
            mbarrier.wait(bars.index(FREE), (even & 1) ^ 1)
            copy_rows(tiles, 0, keys, row, layout)
            async_copy.mbarrier_arrive(bars.index(READY), increment_count=False)
            even += 1
            row = listed_rows(rows, base, t, j * TILE + 2 * TILE + index, first, last, offset, window, k, kind)
            if j + 1 < end:
                mbarrier.wait(bars.index(FREE + 1), (odd & 1) ^ 1)
                copy_rows(tiles, 4, keys, other, layout)
                async_copy.mbarrier_arrive(bars.index(READY + 1), increment_count=False)
                odd += 1
            other = listed_rows(rows, base, t, j * TILE + 3 * TILE + index, first, last, offset, window, k, kind)


@gluon.jit
def _add(weights, tiles, start, left, right):
    """Add the product of weights [64, 64] and two pieces of a tile, from `start` on, to two accumulators."""
    a = warpgroup_mma(weights, tiles.index(start), left, is_async=True)
    b = warpgroup_mma(weights, tiles.index(start + 1), right, is_async=True)
    return warpgroup_mma_wait(0, [a, b])


@gluon.jit
def _add_pair(own, weights, tiles, bars, left, right, zero, pair, both, half: gl.constexpr):
    """Add the values of a pair of tiles, or of its first alone, with this side's weights and the other's; free the tiles."""
    if half == 0:
        left, right = _add(own, tiles, zero, left, right)
        mbarrier.arrive(bars.index(FREE), count=1)
        mbarrier.wait(bars.index(WEIGHTS + 1), pair & 1)
        if both:
            left, right = _add(weights.index(zero + 1), tiles, zero + 4, left, right)
            mbarrier.arrive(bars.index(FREE + 1), count=1)
    else:
        mbarrier.wait(bars.index(WEIGHTS), pair & 1)
        left, right = _add(weights.index(zero), tiles, zero + 2, left, right)
        mbarrier.arrive(bars.index(FREE), count=1)
        if both:
            left, right = _add(own, tiles, zero + 6, left, right)
            mbarrier.arrive(bars.index(FREE + 1), count=1)
    return left, right


@gluon.jit
def _score(queries, tiles, zero, half: gl.constexpr, layout: gl.constexpr):
    """Multiply the queries by one tile of keys, [heads, keys]."""
    acc = warpgroup_mma_init(gl.zeros([TILE, TILE], gl.float32, layout))
    for piece in gl.static_range(4):
        key = tiles.index(zero + 4 * half + piece).permute((1, 0))
        acc = warpgroup_mma(queries.index(zero + piece), key, acc, use_acc=piece > 0, is_async=True)
    return warpgroup_mma_wait(0, [acc])


@gluon.jit
def _hide(s, slot, first, last, layout: gl.constexpr):
    """Put -inf where a tile of scores from `slot` on is not seen."""
    if (slot < first) | (slot + TILE > last):
        place = slot + gl.arange(0, TILE, layout=gl.SliceLayout(0, layout))
        s = gl.where(((place >= first) & (place < last))[None, :], s, float("-inf"))
    return s


@gluon.jit
def _exchange(x, room, bars, place: gl.constexpr, bar: gl.constexpr, turn, half: gl.constexpr):
    """Give the other side a number a head, and return its own."""
    room.index(place + half).store(x)
    mbarrier.arrive(bars.index(bar + half), count=1)
    mbarrier.wait(bars.index(bar + 1 - half), turn & 1)
    return room.index(place + 1 - half).load(x.type.layout)


@gluon.jit
def _write(out, left, right, head_row, half: gl.constexpr):
    """Write half of the channels of 64 heads, in runs of 16 bytes."""
    layout: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4], [0, 32], [0, 64], [8, 0]], [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [64, 128]
    )
    place = out + (head_row + gl.arange(0, TILE, layout=gl.SliceLayout(1, layout))).to(gl.int64)[:, None] * WIDTH
    place = place + (half * 2 * PIECE + gl.arange(0, PIECE, layout=gl.SliceLayout(0, layout)))[None, :]
    gl.store(place, gl.convert_layout(left.to(out.dtype.element_ty), layout))
    gl.store(place + PIECE, gl.convert_layout(right.to(out.dtype.element_ty), layout))


@gluon.jit
def _attend(
    queries, tiles, weights, maxima, bars, m, first, last, scale, counts,
    half: gl.constexpr, layout: gl.constexpr, scores_layout: gl.constexpr,
):  # fmt: skip
    """Attend with one query's 64 heads to all its tiles.

    Args:
        m: [64] the sink's logits. counts: tiles and pairs that this side has been through.
    Returns:
        The sums of weights times values, two pieces; the maximum; this side's sum of weights; the counts.
    """
    tile, pair = counts
    mass = gl.full([TILE], 1.0 if half == 0 else 0.0, gl.float32, gl.SliceLayout(1, scores_layout))
    left = gl.zeros([TILE, PIECE], gl.float32, layout)
    right = gl.zeros([TILE, PIECE], gl.float32, layout)
    end = (last + TILE - 1) // TILE
    for j in range(first // TILE, end, 2):
        zero = hidden_zero(j)
        s = gl.full([TILE, TILE], float("-inf"), gl.float32, scores_layout)
        if j + half < end:
            mbarrier.wait(bars.index(READY + half), tile & 1)
            tile += 1
            s = _score(queries, tiles, zero, half, scores_layout)
        mbarrier.arrive(bars.index(QUERIES_FREE), count=1, pred=j + 2 >= end)
        s = _hide(s, (j + half) * TILE, first, last, scores_layout)
        top = gl.max(s, 1) * scale
        top = gl.maximum(gl.maximum(m, top), _exchange(top, maxima, bars, 0, MAXIMUM, pair, half))
        p = power_of_two(s * scale - top[:, None])
        shrink = power_of_two(m - top)
        m = top
        mass = mass * shrink + gl.sum(p, 1)
        p = p.to(queries.dtype)
        weights.index(half).store(p)
        fence_async_shared()
        mbarrier.arrive(bars.index(WEIGHTS + half), count=1)
        shrink = gl.convert_layout(shrink, gl.SliceLayout(1, layout))[:, None]
        own = gl.convert_layout(p, gl.DotOperandLayout(0, layout, k_width=2))
        left, right = _add_pair(own, weights, tiles, bars, left * shrink, right * shrink, zero, pair, j + 1 < end, half)
        pair += 1
    return left, right, m, mass, (tile, pair)


@gluon.jit
def _multiply(
    position, count, sink, out, lse, scale, tokens, total, queries, tiles, weights, maxima, bars,
    heads: gl.constexpr, window: gl.constexpr, kind: gl.constexpr, half: gl.constexpr,
):  # fmt: skip
    """Attend with 64 heads, one query after the other: scores of every other tile, values of one half of the channels."""
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PIECE, 16])
    head = gl.arange(0, TILE, layout=gl.SliceLayout(1, scores_layout))
    counts = (0, 0)
    turn = 0
    for item in range(gl.program_id(0), total, gl.num_programs(0)):
        t = tokens - 1 - item // (heads // TILE)
        head_row = t * heads + item % (heads // TILE) * TILE
        first, last = slots_of(position, count, t, window, kind)
        m = gl.load(sink + item % (heads // TILE) * TILE + head).to(gl.float32) * LOG2E
        mbarrier.wait(bars.index(QUERIES_READY), turn & 1)
        left, right, m, mass, counts = _attend(
            queries, tiles, weights, maxima, bars, m, first, last, scale, counts, half, layout, scores_layout
        )
        mass = mass + _exchange(mass, maxima, bars, 2, MASS, turn, half)
        turn = turn + 1
        if half == 0:
            gl.store(lse + head_row + head, m + gl.log2(mass))
        scaling = gl.convert_layout(1.0 / mass, gl.SliceLayout(1, layout))[:, None]
        _write(out, left * scaling, right * scaling, head_row, half)


@gluon.jit(do_not_specialize=["tokens", "offset", "total", "k"])
def forward(
    q, keys, rows, position, base, count, sink, out, lse, scale, tokens, offset, total,
    heads: gl.constexpr, window: gl.constexpr, k, kind: gl.constexpr,
):  # fmt: skip
    """Attend as `kernel_forward.forward`, but to `keys` [T + C, 512], window above pool.

    Args:
        position: [T] int64, where a token stands in its sample. tokens: T. offset: where the pool begins in `keys`.
        total: queries times tiles of 64 heads, shared among the programs.
    """
    shared: gl.constexpr = gl.NVMMASharedLayout(128, 16)
    queries = gl.allocate_shared_memory(q.dtype.element_ty, [4, TILE, PIECE], shared)
    tiles = gl.allocate_shared_memory(q.dtype.element_ty, [8, TILE, PIECE], shared)
    weights = gl.allocate_shared_memory(q.dtype.element_ty, [2, TILE, TILE], shared)
    maxima = gl.allocate_shared_memory(gl.float32, [4, TILE], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    bars = gl.allocate_shared_memory(gl.int64, [12, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(bars.index(READY + i), count=128)
        mbarrier.init(bars.index(FREE + i), count=2)
        mbarrier.init(bars.index(MAXIMUM + i), count=1)
        mbarrier.init(bars.index(WEIGHTS + i), count=1)
        mbarrier.init(bars.index(MASS + i), count=1)
    mbarrier.init(bars.index(QUERIES_READY), count=128)
    mbarrier.init(bars.index(QUERIES_FREE), count=2)
    # fmt: off
    gl.warp_specialize(
        [
            (_multiply, (position, count, sink, out, lse, scale, tokens, total, queries, tiles, weights, maxima, bars,
                         heads, window, kind, 0)),
            (_multiply, (position, count, sink, out, lse, scale, tokens, total, queries, tiles, weights, maxima, bars,
                         heads, window, kind, 1)),
            (_copy, (q, keys, rows, position, base, count, tokens, offset, total, queries, tiles, bars, heads, window, k, kind)),
        ],
        [4, 4],
        [216, 72],
    )
    # fmt: on
