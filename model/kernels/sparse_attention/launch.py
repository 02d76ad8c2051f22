"""What the Triton kernels of sparse attention are launched with: where a query's keys are, tiles, and which kernels fit."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from model.kernels.sparse_attention import kernel_forward, kernel_hopper_forward
from model.layout import PackedRow

NONE, RANGE, GATHERED = 0, 1, 2

DENSE = 4
"""Entries a sample may have for each one that a query selects, before scattering their gradient is cheaper than visiting all queries."""

PROCESSORS = 132
"""Programs that run at once where each takes a whole multiprocessor: an H200's; less even elsewhere, not wrong."""

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
    return fits_hopper(q, window) and q.is_cuda and torch.cuda.get_device_capability(q.device)[0] == 9


def fits_hopper(q: Tensor, window: int) -> bool:
    """Say whether queries [T, H, K] and a window have the sizes that the kernels scheduled for Hopper are written for."""
    _, heads, width = q.shape
    tile = kernel_hopper_forward.TILE.value
    return width == kernel_hopper_forward.WIDTH.value and heads % tile == 0 and window % tile == 0 and q.element_size() == 2


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
