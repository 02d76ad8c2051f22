"""Sparse attention on Hopper, for 512 channels and heads in 64s: the same products as `kernel_forward`, scheduled by hand in Gluon.

Two warpgroups share a query's 64 heads. A tile of 64 keys, gathered row by row with asynchronous copies, is both operands of the products:
transposed for the scores, plain for the values. The copy of the next tile and the product of the scores run while the values of the last
tile are still being multiplied; only the softmax leaves the tensor cores idle.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

LOG2E = gl.constexpr(1.4426950408889634)
WIDTH = gl.constexpr(512)
TILE = gl.constexpr(64)
NONE, RANGE, GATHERED = gl.constexpr(0), gl.constexpr(1), gl.constexpr(2)

barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
copy = async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared
"""What Triton 3.6 calls otherwise than 3.9."""


@gluon.jit
def key_rows(
    rows, t, start, tokens, base, count, first,
    window: gl.constexpr, k: gl.constexpr, kind: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """Return the rows of [T + C, 512] in a tile of slots, and which of them the query sees; unseen ones are its own row."""
    slot = first + gl.arange(0, TILE, layout=layout)
    row = t - window + 1 + slot
    seen = (slot < window) & (row >= start)
    if kind != NONE:
        entry = slot - window
        listed = (entry >= 0) & (entry < count)
        if kind == GATHERED:
            number = gl.load(rows + t.to(gl.int64) * k + entry, mask=listed, other=-1)
            listed = listed & (number >= 0)
        else:
            number = base + entry
        row = gl.where(slot < window, row, tokens + number)
        seen = seen | listed
    return gl.where(seen, row, t), seen


@gluon.jit
def copy_rows(target, keys, row, layout: gl.constexpr):
    """Start copying rows of `keys` [*, 512] to a tile of shared memory; the caller ends the group."""
    channel = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, layout))
    copy(target, keys + row.to(gl.int64)[:, None] * WIDTH + channel[None, :])


@gluon.jit
def forward(
    q, keys, cu, sample, rows, base, count, sink, out, lse, scale, tokens,
    heads: gl.constexpr, window: gl.constexpr, k: gl.constexpr, kind: gl.constexpr,
):  # fmt: skip
    """Attend from one query with 64 heads; as `kernel_forward.forward`, but `keys` [T + C, 512] holds window and pool."""
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 32, 16])
    values_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 256, 16])
    copy_layout: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [8, 1], [1, 0])
    row_layout: gl.constexpr = gl.SliceLayout(1, copy_layout)
    head_layout: gl.constexpr = gl.SliceLayout(1, scores_layout)
    shared: gl.constexpr = gl.NVMMASharedLayout(128, 16)
    queries = gl.allocate_shared_memory(q.dtype.element_ty, [TILE, WIDTH], shared)
    tiles = gl.allocate_shared_memory(q.dtype.element_ty, [2, TILE, WIDTH], shared)
    weights = gl.allocate_shared_memory(q.dtype.element_ty, [TILE, TILE], shared)

    t = gl.num_programs(0) - 1 - gl.program_id(0)
    first_row = t.to(gl.int64) * heads + gl.program_id(1) * TILE
    start = gl.load(cu + gl.load(sample + t)).to(gl.int32)
    low = t
    entries = 0
    if kind != NONE:
        low = gl.load(base + t).to(gl.int32)
        entries = gl.load(count + t).to(gl.int32)
    begin = gl.maximum(start - (t - window + 1), 0) // TILE
    end = (window + entries + TILE - 1) // TILE
    row, _known = key_rows(rows, t, start, tokens, low, entries, begin * TILE, window, k, kind, row_layout)
    copy_rows(queries, q, first_row + gl.arange(0, TILE, layout=row_layout), copy_layout)
    copy_rows(tiles.index(0), keys, row, copy_layout)
    async_copy.commit_group()
    row, _known = key_rows(rows, t, start, tokens, low, entries, begin * TILE + TILE, window, k, kind, row_layout)
    if begin + 1 < end:
        copy_rows(tiles.index(1), keys, row, copy_layout)
    async_copy.commit_group()
    row, _known = key_rows(rows, t, start, tokens, low, entries, begin * TILE + 2 * TILE, window, k, kind, row_layout)
    top_of_sink = gl.load(sink + gl.program_id(1) * TILE + gl.arange(0, TILE, layout=head_layout)).to(gl.float32) * LOG2E
    m = top_of_sink
    total = gl.zeros([TILE, TILE], gl.float32, scores_layout)
    values = gl.zeros([TILE, WIDTH], gl.float32, values_layout)
    for j in range(begin, end):
        tile = tiles.index((j - begin) & 1)
        _mine, seen = key_rows(rows, t, start, tokens, low, entries, j * TILE, window, k, kind, gl.SliceLayout(0, scores_layout))
        async_copy.wait_group(1)
        barrier()
        scores = warpgroup_mma(
            queries, tile.permute((1, 0)), gl.zeros([TILE, TILE], gl.float32, scores_layout), use_acc=False, is_async=True
        )
        s = warpgroup_mma_wait(0, [scores])
        s = gl.where(seen[None, :], s * scale, float("-inf"))
        top = gl.maximum(m, gl.max(s, 1))
        p = gl.exp2(s - top[:, None])
        shrink = gl.exp2(m - top)
        m = top
        weights.store(p.to(q.dtype.element_ty))
        total = total * shrink[:, None] + p
        values = values * gl.convert_layout(shrink, gl.SliceLayout(1, values_layout))[:, None]
        fence_async_shared()
        barrier()
        acc = warpgroup_mma(weights, tile, values, is_async=True)
        values = warpgroup_mma_wait(0, [acc])
        barrier()
        if j + 2 < end:
            copy_rows(tile, keys, row, copy_layout)
        async_copy.commit_group()
        row, _known = key_rows(rows, t, start, tokens, low, entries, j * TILE + 3 * TILE, window, k, kind, row_layout)
    barrier()
    mass = gl.sum(total, 1) + gl.exp2(top_of_sink - m)
    gl.store(lse + first_row + gl.arange(0, TILE, layout=head_layout), m + gl.log2(mass))
    values = values / gl.convert_layout(mass, gl.SliceLayout(1, values_layout))[:, None]
    queries.store(values.to(q.dtype.element_ty))
    barrier()
    place = (first_row + gl.arange(0, TILE, layout=row_layout))[:, None] * WIDTH
    channel = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, copy_layout))
    gl.store(out + place + channel[None, :], queries.load(copy_layout))


@gluon.jit
def copy_block(target, x, row, first, width: gl.constexpr, layout: gl.constexpr):
    """Start copying `width` channels from `first` on of rows of `x` [*, 512]; the caller ends the group."""
    channel = first + gl.arange(0, width, layout=gl.SliceLayout(0, layout))
    copy(target, x + row.to(gl.int64)[:, None] * WIDTH + channel[None, :])


@gluon.jit
def probabilities(
    q, keys, cu, sample, rows, base, count, out, grad, lse, delta, p_out, ds_out, scale, log2_scale, tokens,
    heads: gl.constexpr, window: gl.constexpr, k: gl.constexpr, kind: gl.constexpr, slots: gl.constexpr,
):  # fmt: skip
    """Write P and dS of one query and 64 heads; as `kernel_backward.probabilities`, but `keys` [T + C, 512] holds window and pool.

    Queries and output gradients lie above each other in one operand, so that one warpgroup multiplies the keys by the former and one by
    the latter; keys come in quarters of their channels, through a ring of five, three ahead.
    """
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 64, 16])
    whole_layout: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [8, 1], [1, 0])
    copy_layout: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [8, 1], [1, 0])
    store_layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0])
    row_layout: gl.constexpr = gl.SliceLayout(1, copy_layout)
    shared: gl.constexpr = gl.NVMMASharedLayout(128, 16)
    stacked = gl.allocate_shared_memory(q.dtype.element_ty, [4, 128, 128], shared)
    ring = gl.allocate_shared_memory(q.dtype.element_ty, [5, TILE, 128], shared)
    results = gl.allocate_shared_memory(q.dtype.element_ty, [TILE, 128], shared)

    t = gl.num_programs(0) - 1 - gl.program_id(0)
    first_row = t.to(gl.int64) * heads + gl.program_id(1) * TILE
    start = gl.load(cu + gl.load(sample + t)).to(gl.int32)
    low = t
    entries = 0
    if kind != NONE:
        low = gl.load(base + t).to(gl.int32)
        entries = gl.load(count + t).to(gl.int32)
    begin = gl.maximum(start - (t - window + 1), 0) // TILE
    end = (window + entries + TILE - 1) // TILE
    row, _known = key_rows(rows, t, start, tokens, low, entries, begin * TILE, window, k, kind, row_layout)
    head_row = first_row + gl.arange(0, TILE, layout=row_layout)
    for c in gl.static_range(4):
        copy_block(stacked.index(c).slice(0, TILE), q, head_row, c * 128, 128, copy_layout)
        copy_block(stacked.index(c).slice(TILE, TILE), grad, head_row, c * 128, 128, copy_layout)
    async_copy.commit_group()
    for c in gl.static_range(3):
        copy_block(ring.index(c), keys, row, c * 128, 128, copy_layout)
        async_copy.commit_group()
    following, _known = key_rows(rows, t, start, tokens, low, entries, begin * TILE + TILE, window, k, kind, row_layout)

    place = (first_row + gl.arange(0, TILE, layout=gl.SliceLayout(1, whole_layout)))[:, None] * WIDTH
    place = place + gl.arange(0, WIDTH, layout=gl.SliceLayout(0, whole_layout))[None, :]
    d = gl.sum(gl.load(grad + place).to(gl.float32) * gl.load(out + place).to(gl.float32), 1)
    gl.store(delta + first_row + gl.arange(0, TILE, layout=gl.SliceLayout(1, whole_layout)), d)
    barrier()
    column = gl.arange(0, 128, layout=gl.SliceLayout(0, layout))
    norm = gl.load(lse + first_row + column, mask=column < TILE, other=0.0)
    norm += gl.load(delta + first_row + column - TILE, mask=column >= TILE, other=0.0) * scale
    factor = gl.where(column < TILE, log2_scale, scale)
    here = 0
    for j in range(begin, end):
        acc = warpgroup_mma_init(gl.zeros([TILE, 128], gl.float32, layout))
        for c in gl.static_range(4):
            if c >= 2:
                acc = warpgroup_mma_init(warpgroup_mma_wait(1, [acc]))
            async_copy.wait_group(2)
            barrier()
            acc = warpgroup_mma(ring.index(here), stacked.index(c).permute((1, 0)), acc, use_acc=c > 0, is_async=True)
            ahead = gl.where(here >= 2, here - 2, here + 3)
            if c == 0:
                copy_block(ring.index(ahead), keys, row, 384, 128, copy_layout)
            else:
                if j + 1 < end:
                    copy_block(ring.index(ahead), keys, following, (c - 1) * 128, 128, copy_layout)
            async_copy.commit_group()
            here = gl.where(here == 4, 0, here + 1)
        row = following
        following, _known = key_rows(rows, t, start, tokens, low, entries, j * TILE + 2 * TILE, window, k, kind, row_layout)
        _mine, seen = key_rows(rows, t, start, tokens, low, entries, j * TILE, window, k, kind, gl.SliceLayout(1, store_layout))
        y = warpgroup_mma_wait(0, [acc]) * factor[None, :] - norm[None, :]
        results.store(gl.where((column < TILE)[None, :], gl.exp2(y), y).to(q.dtype.element_ty))
        barrier()
        p = results.slice(0, TILE, dim=1).load(store_layout)
        ds = p.to(gl.float32) * results.slice(TILE, TILE, dim=1).load(store_layout).to(gl.float32)
        slot = t.to(gl.int64) * slots + j * TILE + gl.arange(0, TILE, layout=gl.SliceLayout(1, store_layout))
        head = gl.program_id(1) * TILE + gl.arange(0, TILE, layout=gl.SliceLayout(0, store_layout))
        target = slot[:, None] * heads + head[None, :]
        gl.store(p_out + target, p, mask=seen[:, None])
        gl.store(ds_out + target, ds.to(q.dtype.element_ty), mask=seen[:, None])


@gluon.jit
def copy_weights(target, x, row, slot, seen, heads: gl.constexpr, slots: gl.constexpr, layout: gl.constexpr):
    """Start copying 64 heads of one query's row [slots, H] of `x` at a slot for each key, zeros for keys that it does not see."""
    head = row % (heads // TILE) * TILE + gl.arange(0, TILE, layout=gl.SliceLayout(0, layout))
    place = (row // (heads // TILE)).to(gl.int64) * slots + slot
    copy(target, x + place[:, None] * heads + head[None, :], mask=seen[:, None])


@gluon.jit
def key_slots(places, key, local, begin, end, query, most, window: gl.constexpr, kind: gl.constexpr):
    """Return the slot of each key in one query's row, and whether the query sees it."""
    seen = (begin <= query) & (query < end)
    if kind == NONE:
        slot = key - query + window - 1
    elif kind == RANGE:
        slot = window + local
    else:
        slot = gl.load(places + query.to(gl.int64) * most + local, mask=seen, other=-1).to(gl.int32)
        seen = seen & (slot >= 0)
        slot = slot + window
    return slot, seen


@gluon.jit
def key_gradient(
    q, grad, p, ds, places, begin, end, local, dkeys, number, most,
    heads: gl.constexpr, window: gl.constexpr, kind: gl.constexpr, slots: gl.constexpr,
    block: gl.constexpr, width_block: gl.constexpr,
):  # fmt: skip
    """Write P^T grad + dS^T Q; as `kernel_backward.key_gradient`, with block * width_block = 32768, so that a thread sums 128 numbers."""
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [4 if block == 64 else 8, 2 if block == 64 else 1], [16, 128 if block == 256 else 256, 16]
    )
    weights_layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0])
    rows_layout: gl.constexpr = gl.BlockedLayout([1, 8], [2 if block == 256 else 1, 16 if block == 256 else 32], [8, 1], [1, 0])
    shared: gl.constexpr = gl.NVMMASharedLayout(128, 16)
    weights = gl.allocate_shared_memory(q.dtype.element_ty, [4, block, TILE], shared)
    values = gl.allocate_shared_memory(q.dtype.element_ty, [4, TILE, width_block], shared)

    first = gl.program_id(0) * block
    low = gl.load(begin + first)
    high = gl.load(end + gl.minimum(first + block, number) - 1)
    part = (high - low + gl.num_programs(2) - 1) // gl.num_programs(2)
    low = low + gl.program_id(2) * part
    steps = gl.maximum(gl.minimum(part, high - low), 0) * (heads // TILE)
    key = first + gl.arange(0, block, layout=gl.SliceLayout(1, weights_layout))
    key_begin = gl.load(begin + key, mask=key < number, other=0)
    key_end = gl.load(end + key, mask=key < number, other=0)
    key_local = key
    if kind != NONE:
        key_local = gl.load(local + key, mask=key < number, other=0)
    channel = gl.program_id(1) * width_block
    row = low * (heads // TILE)
    tile_rows = gl.arange(0, TILE, layout=gl.SliceLayout(1, rows_layout))
    slot, seen = key_slots(places, key, key_local, key_begin, key_end, low, most, window, kind)
    if steps > 0:
        copy_weights(weights.index(0), p, row, slot, seen, heads, slots, weights_layout)
        copy_block(values.index(0), grad, row * TILE + tile_rows, channel, width_block, rows_layout)
    async_copy.commit_group()
    if steps > 0:
        copy_weights(weights.index(1), ds, row, slot, seen, heads, slots, weights_layout)
        copy_block(values.index(1), q, row * TILE + tile_rows, channel, width_block, rows_layout)
    async_copy.commit_group()
    slot, seen = key_slots(places, key, key_local, key_begin, key_end, low + TILE // heads, most, window, kind)
    acc = warpgroup_mma_init(gl.zeros([block, width_block], gl.float32, layout))
    for i in range(steps):
        here = (2 * i) & 3
        ahead = (2 * i + 2) & 3
        row += 1
        acc = warpgroup_mma_init(warpgroup_mma_wait(1, [acc]))
        async_copy.wait_group(1)
        barrier()
        acc = warpgroup_mma(weights.index(here), values.index(here), acc, is_async=True)
        if i + 1 < steps:
            copy_weights(weights.index(ahead), p, row, slot, seen, heads, slots, weights_layout)
            copy_block(values.index(ahead), grad, row * TILE + tile_rows, channel, width_block, rows_layout)
        async_copy.commit_group()
        acc = warpgroup_mma_init(warpgroup_mma_wait(1, [acc]))
        async_copy.wait_group(1)
        barrier()
        acc = warpgroup_mma(weights.index(here + 1), values.index(here + 1), acc, is_async=True)
        if i + 1 < steps:
            copy_weights(weights.index(ahead + 1), ds, row, slot, seen, heads, slots, weights_layout)
            copy_block(values.index(ahead + 1), q, row * TILE + tile_rows, channel, width_block, rows_layout)
        async_copy.commit_group()
        query = low + (i + 2) * TILE // heads
        slot, seen = key_slots(places, key, key_local, key_begin, key_end, query, most, window, kind)
    total = warpgroup_mma_wait(0, [acc])
    key = first + gl.arange(0, block, layout=gl.SliceLayout(1, layout))
    place = (gl.program_id(2).to(gl.int64) * number + key)[:, None] * WIDTH + channel
    place = place + gl.arange(0, width_block, layout=gl.SliceLayout(0, layout))[None, :]
    gl.store(dkeys + place, total.to(dkeys.dtype.element_ty), mask=(key < number)[:, None])
