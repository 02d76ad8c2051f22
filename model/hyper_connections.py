"""Manifold-constrained hyper-connections: M residual streams, mixed into each sub-layer's input and out of its output."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from model.config import ModelConfig
from model.kernels.choice import implementation_for
from model.kernels.hyper_connections import op
from model.norm import unit_norm


def copies(x: Tensor, count: int) -> Tensor:
    """Start the streams: [T, D] to [T, M, D], `count` copies of each row."""
    if implementation_for(x) == "reference" or count == 1:
        return x.unsqueeze(1).repeat(1, count, 1)
    from model.kernels.hyper_connections.copies import Copies  # brings Triton, which a CPU does without

    return Copies.apply(x, count)


def mix_in(streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, *, config: ModelConfig) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Collapse the streams [T, M, D] into a sub-layer's input; see `model.kernels.hyper_connections.op.mix_in_through`.

    Returns:
        input [T, D] in the dtype of `streams`, post [T, M] fp32, comb [T, M, M] fp32, and the streams for who reads them after this.
    """
    if implementation_for(streams) == "reference":
        fn, base, scale = fn.float(), base.float(), scale.float()
    return op.mix_in_through(streams, fn, base, scale, config=config)


def mix_out(output: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """Put a sub-layer's output [T, D] back into the streams [T, M, D]; see `model.kernels.hyper_connections.op.mix_out`."""
    return op.mix_out(output, streams, post, comb)


def merge(streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, *, config: ModelConfig) -> Tensor:
    """Collapse the streams after the last block: sum_j (sigmoid(mix_j scale + base_j) + eps) X_j, [T, M, D] to [T, D]."""
    if implementation_for(streams) == "triton":
        rows = (1 + streams.shape[1]) * streams.shape[1]  # those that `mix_in` has besides, for post and comb
        parameters = (functional.pad(fn, (0, 0, 0, rows)), functional.pad(base, (0, rows)), functional.pad(scale, (0, 2)))
        return op.mix_in(streams, *parameters, config=config)[0]
    mix = unit_norm(streams.flatten(1).float(), config.rms_norm_eps) @ fn.float().T
    weights = torch.sigmoid(mix * scale + base) + config.hc_eps
    return (weights.unsqueeze(2) * streams.float()).sum(1).to(streams.dtype)
