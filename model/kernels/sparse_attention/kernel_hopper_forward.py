"""Sparse attention's forward on Hopper, for 512 channels and heads in 64s: one warpgroup copies, two multiply.

Each of the two has all scores of a query's 64 heads, and one half of the value channels: scores are made twice, and in exchange nothing
passes between the two, so that one multiplies while the other takes its softmax. A tile of 64 keys is both operands, transposed for the
scores and plain for the values; the copying warpgroup gathers the rows of the next tiles, of the next query too, into two buffers.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier, warpgroup_mma, warpgroup_mma_init, warpgroup_mma_wait

LOG2E = gl.constexpr(1.4426950408889634)
WIDTH = gl.constexpr(512)
TILE = gl.constexpr(64)
PIECE = gl.constexpr(128)
"""Channels in one piece of shared memory; a row has four."""
NONE, RANGE, GATHERED = gl.constexpr(0), gl.constexpr(1), gl.constexpr(2)

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
def listed_rows(rows, base, t, slot, first, last, tokens, window: gl.constexpr, k: gl.constexpr, kind: gl.constexpr):
    """Return the rows of [T + C, K] in the slots of a query; its own row for slots that it does not see."""
    row = t - window + 1 + slot
    if kind == GATHERED:
        number = gl.load(rows + t.to(gl.int64) * k + slot - window, mask=(slot >= window) & (slot < last), other=0)
        row = gl.where(slot < window, row, tokens + number)
    elif kind == RANGE:
        row = gl.where(slot < window, row, tokens + gl.load(base + t).to(gl.int32) + slot - window)
    return gl.where((slot >= first) & (slot < last), row, t)


@gluon.jit
def copy_rows(target, start, x, row, layout: gl.constexpr):
    """Start copying rows of `x` [*, 512] to four pieces of shared memory, from piece `start` on."""
    channel = gl.arange(0, PIECE, layout=gl.SliceLayout(0, layout))
    place = x + row.to(gl.int64)[:, None] * WIDTH + channel[None, :]
    for piece in gl.static_range(4):
        copy(target.index(start + piece), place + piece * PIECE)


@gluon.jit
def _copy(
    q, keys, rows, position, base, count, tokens, total, queries, tiles, bars,
    heads: gl.constexpr, window: gl.constexpr, k: gl.constexpr, kind: gl.constexpr,
):  # fmt: skip
    """Fill the buffers, query after query, as they come free."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    index = gl.arange(0, TILE, layout=gl.SliceLayout(1, layout))
    tile = 0
    turn = 0
    for item in range(gl.program_id(0), total, gl.num_programs(0)):
        t = tokens - 1 - item // (heads // TILE)
        first, last = slots_of(position, count, t, window, kind)
        mbarrier.wait(bars.index(5), (turn & 1) ^ 1)
        copy_rows(queries, 0, q, t * heads + item % (heads // TILE) * TILE + index, layout)
        async_copy.mbarrier_arrive(bars.index(4), increment_count=False)
        turn += 1
        for j in range(first // TILE, (last + TILE - 1) // TILE):
            row = listed_rows(rows, base, t, j * TILE + index, first, last, tokens, window, k, kind)
            mbarrier.wait(bars.index(2 + (tile & 1)), ((tile >> 1) & 1) ^ 1)
            copy_rows(tiles, (tile & 1) * 4, keys, row, layout)
            async_copy.mbarrier_arrive(bars.index(tile & 1), increment_count=False)
            tile += 1


@gluon.jit
def _multiply(
    position, count, sink, out, lse, scale, tokens, total, queries, tiles, bars,
    heads: gl.constexpr, window: gl.constexpr, kind: gl.constexpr, half: gl.constexpr,
):  # fmt: skip
    """Attend with 64 heads, one query after the other, to one half of the channels."""
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PIECE, 16])
    weights_layout: gl.constexpr = gl.DotOperandLayout(0, layout, k_width=2)
    head = gl.arange(0, TILE, layout=gl.SliceLayout(1, scores_layout))
    column = gl.arange(0, TILE, layout=gl.SliceLayout(0, scores_layout))
    tile = 0
    turn = 0
    for item in range(gl.program_id(0), total, gl.num_programs(0)):
        t = tokens - 1 - item // (heads // TILE)
        head_row = t * heads + item % (heads // TILE) * TILE
        first, last = slots_of(position, count, t, window, kind)
        logit = gl.load(sink + item % (heads // TILE) * TILE + head).to(gl.float32) * LOG2E
        m = logit
        mass = gl.full([TILE], 1.0, gl.float32, gl.SliceLayout(1, scores_layout))
        left = gl.zeros([TILE, PIECE], gl.float32, layout)
        right = gl.zeros([TILE, PIECE], gl.float32, layout)
        mbarrier.wait(bars.index(4), turn & 1)
        turn += 1
        for j in range(first // TILE, (last + TILE - 1) // TILE):
            buffer = (tile & 1) * 4
            mbarrier.wait(bars.index(tile & 1), (tile >> 1) & 1)
            acc = warpgroup_mma_init(gl.zeros([TILE, TILE], gl.float32, scores_layout))
            for piece in gl.static_range(4):
                acc = warpgroup_mma(
                    queries.index(piece), tiles.index(buffer + piece).permute((1, 0)), acc, use_acc=piece > 0, is_async=True
                )
            s = warpgroup_mma_wait(0, [acc])
            slot = j * TILE + column
            s = gl.where(((slot >= first) & (slot < last))[None, :], s * scale, float("-inf"))
            top = gl.maximum(m, gl.max(s, 1))
            p = gl.exp2(s - top[:, None])
            shrink = gl.exp2(m - top)
            m = top
            mass = mass * shrink + gl.sum(p, 1)
            shrink = gl.convert_layout(shrink, gl.SliceLayout(1, layout))[:, None]
            p = gl.convert_layout(p.to(out.dtype.element_ty), weights_layout)
            a = warpgroup_mma(p, tiles.index(buffer + 2 * half), left * shrink, is_async=True)
            b = warpgroup_mma(p, tiles.index(buffer + 2 * half + 1), right * shrink, is_async=True)
            left, right = warpgroup_mma_wait(0, [a, b])
            mbarrier.arrive(bars.index(2 + (tile & 1)), count=1)
            tile += 1
        mbarrier.arrive(bars.index(5), count=1)
        if half == 0:
            gl.store(lse + head_row + head, m + gl.log2(mass))
        scaling = gl.convert_layout(1.0 / mass, gl.SliceLayout(1, layout))[:, None]
        place = out + (head_row + gl.arange(0, TILE, layout=gl.SliceLayout(1, layout))).to(gl.int64)[:, None] * WIDTH
        place = place + (half * 2 * PIECE + gl.arange(0, PIECE, layout=gl.SliceLayout(0, layout)))[None, :]
        gl.store(place, (left * scaling).to(out.dtype.element_ty))
        gl.store(place + PIECE, (right * scaling).to(out.dtype.element_ty))


@gluon.jit
def forward(
    q, keys, rows, position, base, count, sink, out, lse, scale, tokens, total,
    heads: gl.constexpr, window: gl.constexpr, k: gl.constexpr, kind: gl.constexpr,
):  # fmt: skip
    """Attend as `kernel_forward.forward`, but to `keys` [T + C, 512], window above pool, and with lists whose entries come first.

    Args:
        position: [T] int64, where a token stands in its sample. total: queries times tiles of 64 heads, shared among the programs.
    """
    shared: gl.constexpr = gl.NVMMASharedLayout(128, 16)
    queries = gl.allocate_shared_memory(q.dtype.element_ty, [4, TILE, PIECE], shared)
    tiles = gl.allocate_shared_memory(q.dtype.element_ty, [8, TILE, PIECE], shared)
    bars = gl.allocate_shared_memory(gl.int64, [6, 1], mbarrier.MBarrierLayout())
    mbarrier.init(bars.index(0), count=128)
    mbarrier.init(bars.index(1), count=128)
    mbarrier.init(bars.index(2), count=2)
    mbarrier.init(bars.index(3), count=2)
    mbarrier.init(bars.index(4), count=128)
    mbarrier.init(bars.index(5), count=2)
    gl.warp_specialize(
        [
            (_multiply, (position, count, sink, out, lse, scale, tokens, total, queries, tiles, bars, heads, window, kind, 0)),
            (_multiply, (position, count, sink, out, lse, scale, tokens, total, queries, tiles, bars, heads, window, kind, 1)),
            (_copy, (q, keys, rows, position, base, count, tokens, total, queries, tiles, bars, heads, window, k, kind)),
        ],
        [4, 4],
        [216, 72],
    )
