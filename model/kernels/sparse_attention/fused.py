"""Sparse attention on a GPU: what the Triton kernels are launched with, and which of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.kernels.sparse_attention import (
    kernel_backward,
    kernel_forward,
    kernel_hopper_forward,
    kernel_hopper_keys,
    kernel_hopper_scores,
)
from model.kernels.sparse_attention.kernel_forward import LOG2E
from model.layout import PackedRow

NONE, RANGE, GATHERED = 0, 1, 2

DENSE = 4
"""Entries a sample may have for each one that a query selects, before scattering their gradient is cheaper than visiting all queries."""

PROCESSORS = 132
"""Programs that run at once where each takes a whole multiprocessor: an H200's; less even elsewhere, not wrong."""

KEY_BLOCK = 128
"""Keys of one program of the keys' gradient on Hopper; 256 reads less and was slower all the same."""

WAVES = 6
"""Times the processors that programs of the pool's gradient are split into, since early keys are seen by more queries than late ones."""

TILES = {
    "forward": {"block": 64, "num_warps": 4, "num_stages": 2},
    "probabilities": {"block": 64, "num_warps": 4, "num_stages": 2},
    "query_gradient": {"block": 64, "num_warps": 4, "num_stages": 3},
    "key_gradient": {"block": 64, "row_block": 64, "num_warps": 4, "num_stages": 3},
    "scatter_gradient": {"block": 64, "num_warps": 4, "num_stages": 2},
}
"""Of heads up to 128 channels wide."""

WIDE_TILES = {
    "forward": {"block": 128, "num_warps": 8, "num_stages": 1},
    "probabilities": {"block": 64, "num_warps": 8, "num_stages": 1},
    "query_gradient": {"block": 64, "num_warps": 8, "num_stages": 2},
    "key_gradient": {"block": 64, "row_block": 64, "num_warps": 8, "num_stages": 2},
    "scatter_gradient": {"block": 32, "num_warps": 4, "num_stages": 2},
}
"""Of wider heads, up to 512."""

WIDE_FP32_TILES = {
    "forward": {"block": 32, "num_warps": 8, "num_stages": 1},
    "probabilities": {"block": 32, "num_warps": 8, "num_stages": 1},
    "query_gradient": {"block": 32, "num_warps": 8, "num_stages": 1},
    "key_gradient": {"block": 32, "row_block": 32, "num_warps": 8, "num_stages": 1},
    "scatter_gradient": {"block": 32, "num_warps": 8, "num_stages": 1},
}
"""Of wider heads in fp32: for comparison, not for speed."""


@dataclass(frozen=True)
class Keys:
    """Window and pool of a row as the kernels want them.

    Attributes:
        row: layout. ratio: compress ratio of the pool.
        x: [T + C, K] window keys above compressed entries.
        kind: `NONE`, `RANGE` (all visible entries) or `GATHERED` (listed ones).
        base, count: [T] entries before the query's sample; how many it sees or lists.
        rows: [T, k] int32 rows of the pool, as far as `count` (`GATHERED`).
        places: [T, most] int16 where each entry stands in `rows`, -1 where it does not; None where the gradient is scattered.
        slots: the longest list.
    """

    row: PackedRow
    ratio: int
    x: Tensor
    kind: int
    base: Tensor
    count: Tensor
    rows: Tensor
    places: Tensor | None
    slots: int

    @property
    def sizes(self) -> dict[str, int]:
        """What every kernel is specialised for."""
        return {"window": self.row.window, "kind": self.kind}

    @property
    def arguments(self) -> tuple[Tensor, ...]:
        """Where a query's keys are."""
        return self.row.cu_seqlens, self.row.sample, self.rows, self.base, self.count

    @property
    def arguments_on_hopper(self) -> tuple[Tensor, ...]:
        """The same for the kernels scheduled for Hopper."""
        return self.rows, self.row.position, self.base, self.count

    @property
    def halves(self) -> tuple[Tensor, Tensor]:
        """Window keys, and compressed entries or whatever where there are none."""
        length = self.row.length
        return self.x[:length], self.x[length:] if self.kind != NONE else self.x


def make_keys(kv: Tensor, ckv: Tensor | None, indices: Tensor | None, *, row: PackedRow, ratio: int, backward: bool) -> Keys:
    """Lay out the keys of a row; lists of local entry numbers become rows."""
    if ckv is None or not len(ckv):
        return Keys(row, 0, kv.contiguous(), NONE, row.sample, row.sample, row.sample, None, 0)
    entries = row.entries[ratio]
    x = torch.cat([kv, ckv])
    if indices is None:
        return Keys(row, ratio, x, RANGE, entries.base, entries.visible, entries.base, None, entries.most)
    k = indices.shape[1]
    rows = torch.empty(indices.shape, device=x.device, dtype=torch.int32)
    count = torch.empty(len(indices), device=x.device, dtype=torch.int32)
    dense = backward and (entries.most <= DENSE * k or torch.are_deterministic_algorithms_enabled())
    places = torch.full((len(indices), entries.most), -1, device=x.device, dtype=torch.int16) if dense else None
    kernel_forward.prepare[(len(indices),)](
        indices.contiguous(),
        entries.base,
        rows,
        count,
        rows if places is None else places,
        k,
        entries.most,
        block=triton.next_power_of_2(k),
        inverse=dense,
    )
    return Keys(row, ratio, x, GATHERED, entries.base, count, rows, places, k)


def on_hopper(q: Tensor, window: int) -> bool:
    """Say whether the kernels scheduled for Hopper take these queries [T, H, K] and this window."""
    _, heads, width = q.shape
    tile = kernel_hopper_forward.TILE.value
    fits = width == kernel_hopper_forward.WIDTH.value and heads % tile == 0 and window % tile == 0
    return fits and q.is_cuda and q.element_size() == 2 and torch.cuda.get_device_capability(q.device)[0] == 9


def shape_of(q: Tensor) -> dict:
    """What the portable kernels are specialised for by the shape and dtype of the queries."""
    return {"heads": q.shape[1], "width": q.shape[2], "precision": "ieee" if q.dtype == torch.float32 else "tf32"}


def tiles_of(q: Tensor, kernel: str) -> dict[str, int]:
    """Tiles of one of the portable kernels."""
    return (TILES if q.shape[2] <= 128 else WIDE_TILES if q.element_size() == 2 else WIDE_FP32_TILES)[kernel]


def head_block_of(q: Tensor) -> int:
    """Heads of one program of the portable kernels: a product has at least 16 rows, shared memory room for few wide ones in fp32."""
    most = 16 if q.shape[2] > 128 and q.element_size() == 4 else 64
    return min(most, max(16, triton.next_power_of_2(q.shape[1])))


class FusedAttention(torch.autograd.Function):
    """Forward and backward of `op.sparse_attention`."""

    @staticmethod
    def forward(ctx, q, kv, ckv, sink, indices, row, ratio):
        ctx.dtypes = kv.dtype, None if ckv is None else ckv.dtype
        kv, ckv = kv.to(q.dtype), None if ckv is None else ckv.to(q.dtype)
        keys = make_keys(kv, ckv, indices, row=row, ratio=ratio, backward=any(ctx.needs_input_grad))
        q = q.contiguous()
        out, lse = attend(q, keys, sink)
        ctx.save_for_backward(q, sink, out, lse)
        ctx.keys, ctx.entries = keys, None if ckv is None else len(ckv)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        q, sink, out, lse = ctx.saved_tensors
        keys, grad = ctx.keys, grad.contiguous()
        p, ds, delta = probabilities(q, keys, (out, grad, lse))
        dq = query_gradient(q, keys, ds)
        dkv = window_gradient(keys, (q, grad, p, ds)).to(ctx.dtypes[0])
        dckv = None if ctx.entries is None else pool_gradient(keys, (q, grad, p, ds), ctx.entries).to(ctx.dtypes[1])
        dsink = -(torch.exp2(sink.float() * LOG2E.value - lse) * delta).sum(0)
        return dq, dkv, dckv, dsink.to(sink.dtype), None, None, None


def attend(q: Tensor, keys: Keys, sink: Tensor) -> tuple[Tensor, Tensor]:
    """Return the output and the log2 of the sum of exponentials, [T, H] fp32."""
    length, heads, width = q.shape
    out, lse = torch.empty_like(q), torch.empty(length, heads, device=q.device, dtype=torch.float32)
    arguments = (sink, out, lse, width**-0.5 * LOG2E.value)
    k = keys.rows.shape[-1] if keys.kind == GATHERED else 0
    if on_hopper(q, keys.row.window):
        total = length * heads // 64
        kernel_hopper_forward.forward[(min(total, PROCESSORS),)](
            q, keys.x, *keys.arguments_on_hopper, *arguments, length, length, total, heads=heads, k=k, **keys.sizes, num_warps=4
        )
    else:
        head_block = head_block_of(q)
        kernel_forward.forward[(length, triton.cdiv(heads, head_block))](
            q, *keys.halves, *keys.arguments, *arguments, head_block=head_block, k=k, **keys.sizes, **shape_of(q), **tiles_of(q, "forward")
        )
    return out, lse


def probabilities(q: Tensor, keys: Keys, results: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Return P and dS, [T, slots, H] in the dtype of `q`, and delta [T, H] fp32, from output, its gradient and its log2 sums."""
    out, grad, lse = results
    length, heads, width = q.shape
    slots = keys.row.window + keys.slots
    p, ds = (torch.empty(length, slots, heads, device=q.device, dtype=q.dtype) for _ in range(2))
    delta, rows = torch.empty_like(lse), length * heads
    arguments = (grad, lse, delta, p, ds, width**-0.5, width**-0.5 * LOG2E.value)
    sizes = {**keys.sizes, "slots": slots, "k": keys.rows.shape[-1] if keys.kind == GATHERED else 0}
    if on_hopper(q, keys.row.window):
        total = length * heads // 64
        kernel_hopper_scores.probabilities[(min(total, PROCESSORS),)](
            q, keys.x, *keys.arguments_on_hopper, out, *arguments, length, total, heads=heads, **sizes, num_warps=4
        )
    else:
        kernel_backward.delta[(triton.cdiv(rows, 16),)](out, grad, delta, rows, width=width, block=16)
        head_block = head_block_of(q)
        kernel_backward.probabilities[(length, triton.cdiv(heads, head_block))](
            q, *keys.halves, *keys.arguments, *arguments, head_block=head_block, **sizes, **shape_of(q), **tiles_of(q, "probabilities")
        )
    return p, ds, delta


def query_gradient(q: Tensor, keys: Keys, ds: Tensor) -> Tensor:
    """Return dQ [T, H, K] from dS."""
    length, heads, _ = q.shape
    dq, head_block = torch.empty_like(q), head_block_of(q)
    sizes = {**keys.sizes, "slots": ds.shape[1], "k": keys.rows.shape[-1] if keys.kind == GATHERED else 0}
    kernel_backward.query_gradient[(length, triton.cdiv(heads, head_block))](
        *keys.halves, *keys.arguments, ds, dq, head_block=head_block, **sizes, **shape_of(q), **tiles_of(q, "query_gradient")
    )
    return dq


def window_gradient(keys: Keys, products: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    """Return the window keys' gradient [T, K] from queries, output gradient, P and dS."""
    row = keys.row
    place = torch.arange(row.length, device=row.sample.device, dtype=torch.int32)
    end = torch.minimum(place + row.window, row.cu_seqlens[row.sample + 1].int())
    return _owned(Keys(row, 0, keys.x, NONE, keys.base, keys.count, keys.rows, None, 0), products, (place, end, place))


def pool_gradient(keys: Keys, products: tuple[Tensor, Tensor, Tensor, Tensor], number: int) -> Tensor:
    """Return the gradient of the `number` compressed entries from queries, output gradient, P and dS."""
    if keys.kind == NONE:
        return keys.x.new_zeros(number, keys.x.shape[1])
    if keys.kind == GATHERED and keys.places is None:
        return _scattered(keys, products)
    row, tokens = keys.row, keys.row.entries[keys.ratio].tokens
    local = torch.arange(number, device=tokens.device) - keys.base[tokens[:, 0]]
    end = row.cu_seqlens[row.sample[tokens[:, 0]] + 1]
    return _owned(keys, products, (tokens[:, -1].int(), end.int(), local.int()))


def _owned(keys: Keys, products: tuple[Tensor, Tensor, Tensor, Tensor], bounds: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Return the gradient of keys [n, K] by blocks of keys; few blocks are split over the queries and summed.

    Args:
        bounds: [n] int32 each: first query that may see a key, one past the last, the key's number in its sample.
    """
    q, _, p, _ = products
    heads, width, number = q.shape[1], q.shape[2], len(bounds[0])
    hopper, tiles = on_hopper(q, keys.row.window), tiles_of(q, "key_gradient")
    block = KEY_BLOCK if hopper else tiles["block"]
    width_block = 32768 // block if hopper else min(width, 256)
    grid = triton.cdiv(number, block), width // width_block
    parts = max(1, min(64, PROCESSORS * (1 if keys.kind == NONE else WAVES) // (grid[0] * grid[1])))
    out = torch.empty(parts, number, width, device=q.device, dtype=q.dtype if parts == 1 else torch.float32)
    places, most = (p, 0) if keys.places is None else (keys.places, keys.places.shape[1])
    arguments = (*products, places, *bounds, out, number, most)
    sizes = {"heads": heads, **keys.sizes, "slots": p.shape[1], "block": block, "width_block": width_block}
    if hopper:
        kernel_hopper_keys.key_gradient[(*grid, parts)](*arguments, **sizes, num_warps=8)
    else:
        kernel_backward.key_gradient[(*grid, parts)](*arguments, **{**shape_of(q), **tiles, **sizes})
    return out[0] if parts == 1 else out.sum(0).to(q.dtype)


def _scattered(keys: Keys, products: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    """Return the gradient of the pool by atomic additions from every query's list."""
    q, _, p, _ = products
    length, heads, width = q.shape
    head_block, width_block = head_block_of(q), min(width, 256)
    out = torch.zeros(len(keys.x) - length, width, device=q.device, dtype=torch.float32)
    kernel_backward.scatter_gradient[(length, width // width_block, triton.cdiv(heads, head_block))](
        *products,
        keys.rows,
        keys.count,
        out,
        window=keys.row.window,
        k=keys.rows.shape[1],
        slots=p.shape[1],
        head_block=head_block,
        width_block=width_block,
        **shape_of(q),
        **tiles_of(q, "scatter_gradient"),
    )
    return out.to(q.dtype)
