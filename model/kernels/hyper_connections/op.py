"""Mixing of the residual streams into a sub-layer's input and out of its output: checks, and which implementation runs."""

from __future__ import annotations

import torch
from torch import Tensor

from model.config import ModelConfig
from model.kernels.choice import implementation_for
from model.kernels.hyper_connections import blocked


def mix_in(streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, *, config: ModelConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Collapse the residual streams into a sub-layer's input, and compute how its output goes back.

    mix = vec(X) fn^T / rms(vec(X)); pre = sigmoid(mix scale + base) + eps; post = 2 sigmoid(...); comb = sinkhorn(...);
    input = sum_j pre_j X_j.

    Args:
        streams: [T, M, D] fp32 or bf16; computed in fp32.
        fn: [2M + M^2, M * D] fp32, rows pre, post, comb (j first); on a GPU any float dtype, and so are base and scale.
        base: [2M + M^2] fp32.
        scale: [3] fp32, of pre, post and comb.
        config: gives `hc_sinkhorn_iters`, `hc_eps` and `rms_norm_eps`.

    Returns:
        input [T, D] in the dtype of `streams`; post [T, M], comb [T, M, M], fp32.

    Source: v4_spec 3; mHC paper.
    """
    return mix_in_through(streams, fn, base, scale, config=config)[:3]


def mix_in_through(
    streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, *, config: ModelConfig
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute `mix_in` and hand the streams through as a fourth result.

    Whoever reads the streams after this takes that result: on a GPU their gradient is then summed in the backward kernel and not in a pass
    of its own.
    """
    if implementation_for(streams) == "reference":
        collapsed, post, comb = blocked.mix_in(_wide(streams), fn, base, scale, config=config)
        return collapsed.to(streams.dtype), post, comb, streams
    if streams.shape[1] != 4:
        raise ValueError(f"hyper-connections: got {streams.shape[1]} streams, expected 4 (the only number that has Triton kernels)")
    from model.kernels.hyper_connections import fused  # brings Triton, which a CPU does without

    return fused.MixIn.apply(streams, fn, base, scale, config)


def mix_out(output: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """Put a sub-layer's output back: X'_k = post_k f + sum_j comb_jk X_j.

    Args:
        output: [T, D] in the dtype of `streams`, f.
        streams: [T, M, D] fp32 or bf16, X; computed in fp32.
        post: [T, M] fp32.
        comb: [T, M, M] fp32.

    Returns:
        [T, M, D] in the dtype of `streams`.
    """
    if implementation_for(streams) == "reference":
        return blocked.mix_out(_wide(output), _wide(streams), post, comb).to(streams.dtype)
    if streams.shape[1] != 4:
        raise ValueError(f"hyper-connections: got {streams.shape[1]} streams, expected 4 (the only number that has Triton kernels)")
    from model.kernels.hyper_connections import fused  # brings Triton, which a CPU does without

    return fused.MixOut.apply(output, streams, post, comb)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
