"""Index queries and keys of V3.2 in decoding, on a GPU: rotated in halves, keys normalised and put in their place.

For benchmarks/bench_gpu_decode.py alone, where V3.2 is what V4 is compared with; generation decodes V3.2 with `model.decoding`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.kernels.indexer.kernel_tokens import turn_halves
from model.kernels.static_decode.rows import Rows
from model.norm import LayerNorm


def turn_queries(q: Tensor, rows: Rows) -> Tensor:
    """Rotate index queries [B, H, K] by their rows' positions as `model.rope.rotate_halves`; K is a power of two."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    _launch(q, (q, q, 0.0), out, rows, key=False)
    return out


def put_key(x: Tensor, norm: LayerNorm, keys: Tensor, rows: Rows) -> None:
    """Normalise and rotate one index key a row and put it in its place.

    Args:
        x: [B, K] projections, rows any distance apart.
        norm: the keys' layer norm.
        keys: [B, N, K], written at each row's position.
        rows: positions and rotations.
    """
    _launch(x.unsqueeze(1), (norm.weight, norm.bias, norm.eps), keys, rows, key=True)


def _launch(x: Tensor, parameters: tuple[Tensor, Tensor, float], out: Tensor, rows: Rows, *, key: bool) -> None:
    weight, bias, eps = parameters
    turn_halves[x.shape[:2]](
        x, weight, bias, out, rows.positions, rows.turns, x.stride(0), out.stride(0), eps, WIDTH=x.shape[2], HALF=rows.turns.shape[1],
        KEY=key, num_warps=1,
    )  # fmt: skip
