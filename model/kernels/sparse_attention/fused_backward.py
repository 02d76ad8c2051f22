"""The gradients of sparse attention on a GPU: a stretch of queries at a time, so that their stored P and dS have bounded room."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from model.kernels.sparse_attention import kernel_backward, kernel_hopper_keys, kernel_hopper_scores
from model.kernels.sparse_attention.kernel_forward import LOG2E
from model.kernels.sparse_attention.launch import GATHERED, NONE, PROCESSORS, Keys, head_block_of, on_hopper, shape_of, tiles_of

KEY_BLOCK = 128
"""Keys of one program of the keys' gradient on Hopper; 256 reads less and was slower all the same."""

WAVES = 6
"""Times the processors that programs of the pool's gradient are split into, since early keys are seen by more queries than late ones."""

STORED = 1 << 31
"""Bytes of P and dS that exist at a time."""


@dataclass(frozen=True)
class Stretch:
    """Queries [first, last) and what their gradients are made of.

    Attributes:
        q, grad: [T, H, K] queries of the whole row and the gradient of its output.
        p, ds: [last - first, slots, H] probabilities and the gradient of their logits, in the dtype of `q`.
    """

    q: Tensor
    grad: Tensor
    p: Tensor
    ds: Tensor
    first: int
    last: int

    @property
    def products(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What the keys' gradient multiplies."""
        return self.q, self.grad, self.p, self.ds

    @property
    def is_all(self) -> bool:
        """Whether it is the whole row."""
        return self.first == 0 and self.last == len(self.q)


def gradients(q: Tensor, keys: Keys, results: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of queries [T, H, K], window keys [T, K] and pool [C, K], and delta [T, H] fp32, see `kernel_backward`.

    Args:
        q: [T, H, K] contiguous.
        keys: what the queries saw.
        results: output and its gradient [T, H, K], contiguous, and log2 of the sums of exponentials [T, H] fp32.
    """
    out, grad, lse = results
    length, heads, _ = q.shape
    slots = keys.row.window + keys.slots
    step = max(1, STORED // (2 * slots * heads * q.element_size()))
    dq, delta = torch.empty_like(q), torch.empty_like(lse)
    window = pool = None
    for first in range(0, length, step):
        last = min(first + step, length)
        p, ds = (torch.empty(last - first, slots, heads, device=q.device, dtype=q.dtype) for _ in range(2))
        stretch = Stretch(q, grad, p, ds, first, last)
        _probabilities(stretch, keys, (out, lse, delta))
        _query_gradient(stretch, keys, dq)
        window = _window_gradient(stretch, keys, window)
        pool = _pool_gradient(stretch, keys, pool)
    assert window is not None and pool is not None
    return dq, window, pool, delta


def _sizes(stretch: Stretch, keys: Keys) -> dict[str, int]:
    return {**keys.sizes, "slots": stretch.p.shape[1], "k": keys.rows.shape[-1] if keys.kind == GATHERED else 0}


def _probabilities(stretch: Stretch, keys: Keys, results: tuple[Tensor, Tensor, Tensor]) -> None:
    """Fill P, dS and delta from the output and its log2 sums."""
    q, (out, lse, delta) = stretch.q, results
    _, heads, width = q.shape
    arguments = (stretch.grad, lse, delta, stretch.p, stretch.ds, width**-0.5, width**-0.5 * LOG2E.value)
    sizes, count = _sizes(stretch, keys), stretch.last - stretch.first
    if on_hopper(q, keys.row.window):
        total = count * heads // 64
        kernel_hopper_scores.probabilities[(min(total, PROCESSORS),)](
            q, keys.x, *keys.arguments_on_hopper, out, *arguments, stretch.last, stretch.first, keys.row.length, total, heads=heads,
            **sizes, num_warps=4,
        )  # fmt: skip
    else:
        rows = len(q) * heads
        if stretch.first == 0:
            kernel_backward.delta[(triton.cdiv(rows, 16),)](out, stretch.grad, delta, rows, width=width, block=16)
        head_block = head_block_of(q)
        kernel_backward.probabilities[(count, triton.cdiv(heads, head_block))](
            q, *keys.halves, *keys.arguments, *arguments, stretch.first, head_block=head_block, **sizes, **shape_of(q),
            **tiles_of(q, "probabilities"),
        )  # fmt: skip


def _query_gradient(stretch: Stretch, keys: Keys, dq: Tensor) -> None:
    """Fill the stretch's rows of dQ [T, H, K]."""
    head_block = head_block_of(dq)
    kernel_backward.query_gradient[(stretch.last - stretch.first, triton.cdiv(dq.shape[1], head_block))](
        *keys.halves, *keys.arguments, stretch.ds, dq, stretch.first, head_block=head_block, **_sizes(stretch, keys), **shape_of(dq),
        **tiles_of(dq, "query_gradient"),
    )  # fmt: skip


def _window_gradient(stretch: Stretch, keys: Keys, total: Tensor | None) -> Tensor:
    """Add the stretch's share to the window keys' gradient [T, K]."""
    row = keys.row
    low = max(0, stretch.first - row.window + 1)
    place = torch.arange(low, stretch.last, device=row.sample.device, dtype=torch.int32)
    begin = place.clamp(min=stretch.first)
    end = torch.minimum(place + row.window, row.cu_seqlens[row.sample[low : stretch.last] + 1].int()).clamp(max=stretch.last)
    window = Keys(row, 0, keys.x, NONE, keys.base, keys.count, keys.rows, None, 0)
    share = _owned(window, stretch, (begin, end, place))
    if stretch.is_all:
        return share
    if total is None:
        total = share.new_zeros(row.length, share.shape[1])
    total[low : stretch.last] += share
    return total


def _pool_gradient(stretch: Stretch, keys: Keys, total: Tensor | None) -> Tensor:
    """Add the stretch's share to the gradient of the compressed entries [C, K]."""
    number = len(keys.x) - keys.row.length
    if keys.kind == NONE:
        return keys.x.new_zeros(number, keys.x.shape[1])
    if keys.kind == GATHERED and keys.places is None:
        return _scattered(stretch, keys, total)
    row, tokens = keys.row, keys.row.entries[keys.ratio].tokens
    local = torch.arange(number, device=tokens.device) - keys.base[tokens[:, 0]]
    end = row.cu_seqlens[row.sample[tokens[:, 0]] + 1]
    bounds = tokens[:, -1].clamp(min=stretch.first).int(), end.clamp(max=stretch.last).int(), local.int()
    share = _owned(keys, stretch, bounds)
    return share if total is None else total.add_(share)


def _owned(keys: Keys, stretch: Stretch, bounds: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Return the gradient of keys [n, K] by blocks of keys; few blocks are split over the queries and summed.

    It is in the dtype of the queries where the stretch is the whole row, in fp32 where others are added.

    Args:
        bounds: [n] int32 each: first query that may see a key, one past the last, the key's number in its sample (the key's row where
            `keys` is the window alone).
    """
    q, p = stretch.q, stretch.p
    heads, width, number = q.shape[1], q.shape[2], len(bounds[0])
    hopper, tiles = on_hopper(q, keys.row.window), tiles_of(q, "key_gradient")
    block = KEY_BLOCK if hopper else tiles["block"]
    width_block = 32768 // block if hopper else min(width, 256)
    grid = triton.cdiv(number, block), width // width_block
    parts = max(1, min(64, PROCESSORS * (1 if keys.kind == NONE else WAVES) // (grid[0] * grid[1])))
    dtype = q.dtype if stretch.is_all else torch.float32
    out = torch.empty(parts, number, width, device=q.device, dtype=dtype if parts == 1 else torch.float32)
    places, most = (p, 0) if keys.places is None else (keys.places, keys.places.shape[1])
    arguments = (*stretch.products, places, *bounds, out, stretch.first, number, most)
    sizes = {"heads": heads, **keys.sizes, "slots": p.shape[1], "block": block, "width_block": width_block}
    if hopper:
        kernel_hopper_keys.key_gradient[(*grid, parts)](*arguments, **sizes, num_warps=8)
    else:
        kernel_backward.key_gradient[(*grid, parts)](*arguments, **{**shape_of(q), **tiles, **sizes})
    return out[0] if parts == 1 else out.sum(0).to(dtype)


def _scattered(stretch: Stretch, keys: Keys, total: Tensor | None) -> Tensor:
    """Add the gradient of the pool by atomic additions from every query's list, fp32."""
    q, p = stretch.q, stretch.p
    length, heads, width = q.shape
    head_block, width_block = head_block_of(q), min(width, 256)
    if total is None:
        total = torch.zeros(len(keys.x) - length, width, device=q.device, dtype=torch.float32)
    kernel_backward.scatter_gradient[(stretch.last - stretch.first, width // width_block, triton.cdiv(heads, head_block))](
        *stretch.products,
        keys.rows,
        keys.count,
        total,
        stretch.first,
        window=keys.row.window,
        k=keys.rows.shape[1],
        slots=p.shape[1],
        head_block=head_block,
        width_block=width_block,
        **shape_of(q),
        **tiles_of(q, "scatter_gradient"),
    )
    return total
