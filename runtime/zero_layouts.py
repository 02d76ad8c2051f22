"""How ZeRO's flat slices relate to whole matrices, for the optimizer of `runtime.optim`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Transform = Callable[[Sequence[Tensor]], None]
"""Changes matrices in place."""


@dataclass
class ContiguousLayout:
    """ZeRO 1 and 2: all parameters of a group end to end in one buffer, of which each rank owns one contiguous slice.

    Attributes:
        shapes: of the parameters, in buffer order.
        offsets: where each begins in the buffer.
        process_group: the ranks that share the buffer.
    """

    shapes: Sequence[torch.Size]
    offsets: Sequence[int]
    process_group: Any

    def update(self, flat: Tensor, transform: Transform) -> Tensor:
        """Transform the matrices that overlap this rank's slice `flat` [n], on one rank in place; returns the slice [n] of the result.

        What lies between and behind the parameters is returned as it came.
        """
        ranks, rank = dist.get_world_size(self.process_group), dist.get_rank(self.process_group)
        full = flat if ranks == 1 else flat.new_empty(flat.numel() * ranks)
        if ranks > 1:
            dist.all_gather_into_tensor(full, flat.contiguous(), group=self.process_group)
        low, high = rank * flat.numel(), (rank + 1) * flat.numel()
        mine = [(o, s) for o, s in zip(self.offsets, self.shapes, strict=True) if o < high and o + prod(s) > low]
        transform([full[o : o + prod(s)].view(s) for o, s in mine])
        return full[low:high]


@dataclass
class ShardedLayout:
    """ZeRO 3: every parameter is cut into equal shards, and a rank's buffer holds its shard of each, end to end.

    Attributes:
        shapes: of the whole parameters, in buffer order.
        shards: elements of one rank's shard of each, padding included.
        process_group: the ranks that share them.
    """

    shapes: Sequence[torch.Size]
    shards: Sequence[int]
    process_group: Any

    def update(self, flat: Tensor, transform: Transform) -> Tensor:
        """Transform all matrices, each on one rank, and return this rank's shards [n] of the result."""
        ranks, rank = dist.get_world_size(self.process_group), dist.get_rank(self.process_group)
        gathered = flat.new_empty(ranks * flat.numel())
        dist.all_gather_into_tensor(gathered, flat.contiguous(), group=self.process_group)
        full = gathered.view(ranks, -1)
        starts = [0, *accumulate(self.shards)]
        mine = range(rank, len(self.shapes), ranks)
        padded = [full[:, starts[i] : starts[i + 1]].flatten() for i in mine]
        transform([whole[: prod(self.shapes[i])].view(self.shapes[i]) for i, whole in zip(mine, padded, strict=True)])
        out = torch.zeros_like(full)
        for i, whole in zip(mine, padded, strict=True):
            whole[prod(self.shapes[i]) :] = 0
            out[:, starts[i] : starts[i + 1]] = whole.view(ranks, -1)
        dist.all_reduce(out, group=self.process_group)
        return out[rank]


def layouts_of(zero: Any, stage: int) -> dict[Tensor, ContiguousLayout | ShardedLayout]:
    """Read the layouts out of DeepSpeed's ZeRO optimizer, keyed by the flat tensor that the inner optimizer steps.

    Args:
        zero: `engine.optimizer` of a DeepSpeed engine.
        stage: 0 to 3; stage 0 keeps whole parameters and needs none.
    """
    if stage == 0:
        return {}
    if stage == 3:
        return {
            flat: ShardedLayout([p.ds_shape for p in group], [p.partition_numel() for p in group], process_group)
            for flat, group, process_group in zip(
                zero.fp32_partitioned_groups_flat, zero.fp16_groups, zero.sub_group_process_groups, strict=True
            )
        }
    return {
        flat: ContiguousLayout([m.shape for m in meta], offsets, process_group)
        for flat, meta, offsets, process_group in zip(
            zero.single_partition_of_fp32_groups,
            zero.round_robin_bit16_meta,
            zero.round_robin_bit16_offsets,
            zero.real_dp_process_group,
            strict=True,
        )
    }
