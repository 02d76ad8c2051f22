"""The definition of the compressor's pooling, entry by entry."""

from __future__ import annotations

import torch
from torch import Tensor

from model.layout import Entries


def pool(kv: Tensor, gate: Tensor, ape: Tensor, entries: Entries, *, overlaps: bool) -> Tensor:
    """Compute `fused.pool`; the arguments are the same, `shared` apart."""
    ratio, width = entries.ratio, kv.shape[1] // (2 if overlaps else 1)
    tokens = entries.computed.view(-1, ratio)
    out = []
    for number, first in enumerate(entries.first.tolist()):
        values, gates = kv[tokens[number]][:, -width:].double(), (gate[tokens[number]].double() + ape.double())[:, -width:]
        if overlaps and not first:
            values = torch.cat([kv[tokens[number - 1]][:, :width].double(), values])
            gates = torch.cat([(gate[tokens[number - 1]].double() + ape.double())[:, :width], gates])
        out.append((gates.softmax(0) * values).sum(0))
    return torch.stack(out).float()
