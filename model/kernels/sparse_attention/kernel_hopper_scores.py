"""P and dS of sparse attention on Hopper, for 512 channels and heads in 64s: one warpgroup copies, two multiply every other tile each.

Scores and their gradient are made transposed, [keys, heads], by one product of the keys with queries and output
gradients, one above the other; keys come in quarters of their channels.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier, warpgroup_mma, warpgroup_mma_init, warpgroup_mma_wait

from model.kernels.sparse_attention.kernel_hopper_forward import PIECE, TILE, WIDTH, copy, listed_rows, power_of_two, slots_of

RING = gl.constexpr(3)
"""Pieces in flight for each of the two that multiply; what shared memory holds beside queries and output gradients."""

FREE, OPERANDS_READY, OPERANDS_FREE, DELTA = gl.constexpr(6), gl.constexpr(12), gl.constexpr(13), gl.constexpr(14)
"""Where the barriers stand, after one for each piece that is ready."""


@gluon.jit
def _head(column):
    """Return the head that stands in a column of the products.

    A thread holds columns 8 b + 2 q + e of a product, for its own q in 0..3, all b in 0..7 and e in 0..1; they shall be 16 heads in a row.
    """
    return column // 2 % 4 * 16 + column // 8 * 2 + column % 2


@gluon.jit
def _in_order(x, layout: gl.constexpr):
    """Put the columns of [64, 64] in the order of heads; every thread keeps what it has."""
    x = x.reshape([TILE, 8, 4, 2]).permute([0, 2, 1, 3]).reshape([TILE, TILE])
    return gl.convert_layout(x, layout, assert_trivial=True)


@gluon.jit
def _copy_piece(ring, x, row, piece, turn, bars, side: gl.constexpr, layout: gl.constexpr):
    """Start copying one quarter of rows of keys [*, 512] to the next place of one ring, when it comes free."""
    here = side * RING + turn % RING
    channel = piece * PIECE + gl.arange(0, PIECE, layout=gl.SliceLayout(0, layout))
    mbarrier.wait(bars.index(FREE + here), (turn // RING & 1) ^ 1)
    copy(ring.index(here), x + row.to(gl.int64)[:, None] * WIDTH + channel[None, :])
    async_copy.mbarrier_arrive(bars.index(here), increment_count=False)


@gluon.jit
def _copy(
    q, grad, keys, rows, position, base, count, tokens, offset, total, operands, ring, bars,
    heads: gl.constexpr, window: gl.constexpr, k, kind: gl.constexpr,
):  # fmt: skip
    """Fill the rings, query after query: a pair of tiles at a time, one for each side."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    index = gl.arange(0, TILE, layout=gl.SliceLayout(1, layout))
    even = 0
    odd = 0
    turn = 0
    for item in range(gl.program_id(0), total, gl.num_programs(0)):
        t = tokens - 1 - item // (heads // TILE)
        first, last = slots_of(position, count, t, window, kind)
        head_row = t * heads + item % (heads // TILE) * TILE + _head(index)
        mbarrier.wait(bars.index(OPERANDS_FREE), (turn & 1) ^ 1)
        channel = gl.arange(0, PIECE, layout=gl.SliceLayout(0, layout))
        place = head_row.to(gl.int64)[:, None] * WIDTH + channel[None, :]
        for piece in gl.static_range(4):
            copy(operands.index(piece).slice(0, TILE), q + place + piece * PIECE)
            copy(operands.index(piece).slice(TILE, TILE), grad + place + piece * PIECE)
        async_copy.mbarrier_arrive(bars.index(OPERANDS_READY), increment_count=False)
        turn = turn + 1
        end = (last + TILE - 1) // TILE
        for j in range(first // TILE, end, 2):
            row = listed_rows(rows, base, t, j * TILE + index, first, last, offset, window, k, kind)
            other = listed_rows(rows, base, t, j * TILE + TILE + index, first, last, offset, window, k, kind)
            for piece in gl.static_range(4):
                _copy_piece(ring, keys, row, piece, even, bars, 0, layout)
                even += 1
                if j + 1 < end:
                    _copy_piece(ring, keys, other, piece, odd, bars, 1, layout)
                    odd += 1


@gluon.jit
def _write_delta(out, grad, delta, row):
    """Write the sums of out * grad of 32 heads, from row `row` on."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [4, 1], [1, 0])
    row = row + gl.arange(0, TILE // 2, layout=gl.SliceLayout(1, layout))
    place = row.to(gl.int64)[:, None] * WIDTH + gl.arange(0, WIDTH, layout=gl.SliceLayout(0, layout))[None, :]
    gl.store(delta + row, gl.sum(gl.load(out + place).to(gl.float32) * gl.load(grad + place).to(gl.float32), 1))


@gluon.jit
def _products(operands, ring, bars, taken, side: gl.constexpr):
    """Multiply one tile of keys by queries and output gradients: [keys, heads] of each, columns as `_head` says."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    both_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    acc = warpgroup_mma_init(gl.zeros([TILE, 2 * TILE], gl.float32, both_layout))
    before = 0
    for piece in gl.static_range(4):
        here = side * RING + taken % RING
        mbarrier.wait(bars.index(here), taken // RING & 1)
        acc = warpgroup_mma(ring.index(here), operands.index(piece).permute((1, 0)), acc, use_acc=piece > 0, is_async=True)
        if piece > 0:
            acc = warpgroup_mma_init(warpgroup_mma_wait(1, [acc]))
            mbarrier.arrive(bars.index(FREE + before), count=1)
        before = here
        taken += 1
    both = warpgroup_mma_wait(0, [acc])
    mbarrier.arrive(bars.index(FREE + before), count=1)
    s, d = both.reshape([TILE, 2, TILE]).permute([0, 2, 1]).split()
    return gl.convert_layout(s, layout, assert_trivial=True), gl.convert_layout(d, layout, assert_trivial=True)


@gluon.jit
def _write(x, values, line, j, first, last, column, heads: gl.constexpr, slots):
    """Write [keys, heads] of one tile of a query to line `line` of `x` [*, slots, H], where seen, in runs of 16 heads."""
    layout: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4], [0, 8], [8, 0]], [[0, 16], [0, 32], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [64, 64]
    )
    slot = j * TILE + gl.arange(0, TILE, layout=gl.SliceLayout(1, layout))
    head = column + gl.arange(0, TILE, layout=gl.SliceLayout(0, layout))
    place = (line.to(gl.int64) * slots + slot)[:, None] * heads + head[None, :]
    gl.store(x + place, _in_order(values.to(x.dtype.element_ty), layout), mask=((slot >= first) & (slot < last))[:, None])


@gluon.jit
def _multiply(
    position, count, out, grad, lse, delta, p_out, ds_out, scale, log2_scale, tokens, origin, total, operands, ring, bars,
    heads: gl.constexpr, window: gl.constexpr, kind: gl.constexpr, slots, side: gl.constexpr,
):  # fmt: skip
    """Write P and dS of every other tile, one query after the other; before, delta of half of the heads."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    head = _head(gl.arange(0, TILE, layout=gl.SliceLayout(0, layout)))
    taken = 0
    turn = 0
    for item in range(gl.program_id(0), total, gl.num_programs(0)):
        t = tokens - 1 - item // (heads // TILE)
        column = item % (heads // TILE) * TILE
        first, last = slots_of(position, count, t, window, kind)
        norm = gl.load(lse + t * heads + column + head)
        _write_delta(out, grad, delta, t * heads + column + side * (TILE // 2))
        mbarrier.wait(bars.index(OPERANDS_READY), turn & 1)
        mbarrier.arrive(bars.index(DELTA + side), count=1)
        mbarrier.wait(bars.index(DELTA + 1 - side), turn & 1)
        turn = turn + 1
        mean = gl.load(delta + t * heads + column + head) * scale
        end = (last + TILE - 1) // TILE
        for j in range(first // TILE + side, end, 2):
            s, d = _products(operands, ring, bars, taken, side)
            taken += 4
            mbarrier.arrive(bars.index(OPERANDS_FREE), count=1, pred=j + 2 >= end)
            p = power_of_two(s * log2_scale - norm[None, :])
            _write(p_out, p, t - origin, j, first, last, column, heads, slots)
            _write(ds_out, p * (d * scale - mean[None, :]), t - origin, j, first, last, column, heads, slots)
        mbarrier.arrive(bars.index(OPERANDS_FREE), count=1, pred=first // TILE + side >= end)


@gluon.jit(do_not_specialize=["tokens", "origin", "offset", "total", "k", "slots"])
def probabilities(
    q, keys, rows, position, base, count, out, grad, lse, delta, p_out, ds_out, scale, log2_scale, tokens, origin, offset, total,
    heads: gl.constexpr, window: gl.constexpr, k, kind: gl.constexpr, slots,
):  # fmt: skip
    """Write P and dS as `kernel_backward.probabilities`, from keys [T + C, 512], window above pool, and lists whose entries come first.

    Args:
        out: [T, H, K] the forward's. delta: [T, H] fp32 out, the sum of out * grad.
        position: [T] int64, where a token stands in its sample. tokens: one past the last query, origin: the first. offset: where the
            pool begins in `keys`. total: queries times tiles of 64 heads, shared among the programs.
    """
    shared: gl.constexpr = gl.NVMMASharedLayout(128, 16)
    operands = gl.allocate_shared_memory(q.dtype.element_ty, [4, 2 * TILE, PIECE], shared)
    ring = gl.allocate_shared_memory(q.dtype.element_ty, [2 * RING, TILE, PIECE], shared)
    bars = gl.allocate_shared_memory(gl.int64, [16, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2 * RING):
        mbarrier.init(bars.index(i), count=128)
        mbarrier.init(bars.index(FREE + i), count=1)
    mbarrier.init(bars.index(OPERANDS_READY), count=128)
    mbarrier.init(bars.index(OPERANDS_FREE), count=2)
    mbarrier.init(bars.index(DELTA), count=1)
    mbarrier.init(bars.index(DELTA + 1), count=1)
    # fmt: off
    gl.warp_specialize(
        [
            (_multiply, (position, count, out, grad, lse, delta, p_out, ds_out, scale, log2_scale, tokens, origin, total, operands, ring,
                         bars, heads, window, kind, slots, 0)),
            (_multiply, (position, count, out, grad, lse, delta, p_out, ds_out, scale, log2_scale, tokens, origin, total, operands, ring,
                         bars, heads, window, kind, slots, 1)),
            (_copy, (q, grad, keys, rows, position, base, count, tokens, offset, total, operands, ring, bars, heads, window, k, kind)),
        ],
        [4, 4],
        [200, 104],
    )
    # fmt: on
