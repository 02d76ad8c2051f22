"""The keys' gradient of sparse attention on Hopper, for 512 channels and heads in 64s.

Two warpgroups sum P^T grad + dS^T Q of a block of keys over the queries that see them. The operands of the next two products are copied
while one is multiplied, rows of weights by their slot, zeros where a query does not see a key.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, warpgroup_mma, warpgroup_mma_init, warpgroup_mma_wait

from model.kernels.sparse_attention.kernel_hopper_forward import GATHERED, NONE, TILE, WIDTH, copy

barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
"""What Triton 3.6 calls otherwise than 3.9."""


@gluon.jit
def _copy_operands(
    weights, values, x, y, row, origin, slot, seen, channel,
    heads: gl.constexpr, slots, weights_layout: gl.constexpr, rows_layout: gl.constexpr,
):  # fmt: skip
    """Start copying the operands of one product; the caller ends the group.

    Args:
        weights, values: where to.
        x: [*, slots, H] from query `origin` on, at the slot of each key, zeros for keys that the query does not see.
        y: [T, H, K], channels from `channel` on. row: 64 heads of a query, counted over all queries.
    """
    head = row % (heads // TILE) * TILE + gl.arange(0, TILE, layout=gl.SliceLayout(0, weights_layout))
    place = (row // (heads // TILE) - origin).to(gl.int64) * slots + slot
    copy(weights, x + place[:, None] * heads + head[None, :], mask=seen[:, None])
    line = row * TILE + gl.arange(0, TILE, layout=gl.SliceLayout(1, rows_layout))
    channel = channel + gl.arange(0, values.shape[1], layout=gl.SliceLayout(0, rows_layout))
    copy(values, y + line.to(gl.int64)[:, None] * WIDTH + channel[None, :])


@gluon.jit
def read_places(places, local, begin, end, query, most, kind: gl.constexpr):
    """Start reading where each key stands in one query's list (GATHERED); return what else its slot follows from."""
    place = local
    if kind == GATHERED:
        place = gl.load(places + query.to(gl.int64) * most + local, mask=(begin <= query) & (query < end), other=-1)
    return place


@gluon.jit
def key_slots(place, begin, end, query, window: gl.constexpr, kind: gl.constexpr):
    """Return the slot of each key in one query's row, from what `read_places` gave, and whether the query sees it."""
    seen = (begin <= query) & (query < end)
    if kind == NONE:
        slot = place - query + window - 1
    else:
        slot = window + place.to(gl.int32)
        seen = seen & (place >= 0)
    return slot, seen


@gluon.jit
def _sum(
    q, grad, p, ds, places, key_begin, key_end, key_local, most, low, origin, steps, channel, weights, values, total,
    heads: gl.constexpr, window: gl.constexpr, kind: gl.constexpr, slots,
    weights_layout: gl.constexpr, rows_layout: gl.constexpr,
):  # fmt: skip
    """Sum the products of at least one step, 64 heads of a query each, into `total` [keys, channels]."""
    row = low * (heads // TILE)
    place = read_places(places, key_local, key_begin, key_end, low, most, kind)
    slot, seen = key_slots(place, key_begin, key_end, low, window, kind)
    _copy_operands(weights.index(0), values.index(0), p, grad, row, origin, slot, seen, channel, heads, slots, weights_layout, rows_layout)
    async_copy.commit_group()
    _copy_operands(weights.index(1), values.index(1), ds, q, row, origin, slot, seen, channel, heads, slots, weights_layout, rows_layout)
    async_copy.commit_group()
    place = read_places(places, key_local, key_begin, key_end, low + TILE // heads, most, kind)
    slot, seen = key_slots(place, key_begin, key_end, low + TILE // heads, window, kind)
    acc = warpgroup_mma_init(total)
    for i in range(steps):
        row += 1
        for product in gl.static_range(2):
            here = ((2 * i) & 3) + product
            ahead = ((2 * i + 2) & 3) + product
            async_copy.wait_group(1)
            acc = warpgroup_mma_init(warpgroup_mma_wait(1, [acc]))
            barrier()
            acc = warpgroup_mma(weights.index(here), values.index(here), acc, is_async=True)
            if i + 1 < steps:
                x = p if product == 0 else ds
                y = grad if product == 0 else q
                _copy_operands(
                    weights.index(ahead), values.index(ahead), x, y, row, origin, slot, seen, channel,
                    heads, slots, weights_layout, rows_layout,
                )  # fmt: skip
            async_copy.commit_group()
        place = read_places(places, key_local, key_begin, key_end, low + (i + 2) * TILE // heads, most, kind)
        slot, seen = key_slots(place, key_begin, key_end, low + (i + 2) * TILE // heads, window, kind)
    return warpgroup_mma_wait(0, [acc])


@gluon.jit(do_not_specialize=["origin", "number", "most", "slots"])
def key_gradient(
    q, grad, p, ds, places, begin, end, local, dkeys, origin, number, most,
    heads: gl.constexpr, window: gl.constexpr, kind: gl.constexpr, slots,
    block: gl.constexpr, width_block: gl.constexpr,
):  # fmt: skip
    """Write P^T grad + dS^T Q as `kernel_backward.key_gradient`, of 128 keys and 256 channels, so that a thread sums 128 numbers."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, 256, 16])
    weights_layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0])
    rows_layout: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [8, 1], [1, 0])
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
    key_local = gl.load(local + key, mask=key < number, other=0)
    channel = gl.program_id(1) * width_block
    total = gl.zeros([block, width_block], gl.float32, layout)
    if steps > 0:  # a loop that might not run once would make the compiler wait for every product
        total = _sum(
            q, grad, p, ds, places, key_begin, key_end, key_local, most, low, origin, steps, channel, weights, values, total,
            heads, window, kind, slots, weights_layout, rows_layout,
        )  # fmt: skip
    key = first + gl.arange(0, block, layout=gl.SliceLayout(1, layout))
    target = (gl.program_id(2).to(gl.int64) * number + key)[:, None] * WIDTH + channel
    target = target + gl.arange(0, width_block, layout=gl.SliceLayout(0, layout))[None, :]
    gl.store(dkeys + target, total.to(dkeys.dtype.element_ty), mask=(key < number)[:, None])
