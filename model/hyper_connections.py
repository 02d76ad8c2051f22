"""Manifold-constrained hyper-connections: M residual streams, mixed into each sub-layer's input and out of its output."""

from __future__ import annotations

import torch
from torch import Tensor

from model.config import ModelConfig
from model.kernels.sinkhorn.op import sinkhorn
from model.norm import unit_norm


def mix_in(streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, *, config: ModelConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Collapse the residual streams into a sub-layer's input, and compute how its output goes back.

    mix = (vec(X) / rms(vec(X))) fn^T, split into pre (M), post (M) and comb (M x M); input = sum_j pre_j X_j.

    Args:
        streams: [T, M, D].
        fn: [2M + M^2, M * D] fp32.
        base: [2M + M^2] fp32.
        scale: [3] fp32, of pre, post and comb.
        config: gives `hc_sinkhorn_iters`, `hc_eps`, `rms_norm_eps`.

    Returns:
        input [T, D] in the dtype of `streams`, post [T, M] fp32, comb [T, M, M] fp32.

    Source: v4_spec 3; mHC paper.
    """
    tokens, count, _ = streams.shape
    mix = (unit_norm(streams.flatten(1).float(), config.rms_norm_eps) @ fn.float().T).T.contiguous()  # [2M + M^2, T]
    shift = base.float().unsqueeze(1)
    pre = torch.sigmoid(mix[:count] * scale[0] + shift[:count]) + config.hc_eps
    post = 2 * torch.sigmoid(mix[count : 2 * count] * scale[1] + shift[count : 2 * count])
    logits = (mix[2 * count :] * scale[2] + shift[2 * count :]).view(count, count, tokens)
    comb = sinkhorn(logits, config.hc_sinkhorn_iters, config.hc_eps)
    return collapse(streams, pre.T), post.T, comb.permute(2, 0, 1)


def mix_out(output: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """Put a sub-layer's output back: X'_k = post_k f + sum_j comb_jk X_j.

    Args:
        output: [T, D] f.
        streams: [T, M, D] X.
        post: [T, M] fp32.
        comb: [T, M, M] fp32.

    Returns:
        [T, M, D] in the dtype of `streams`.
    """
    mixed = torch.bmm(comb.mT, streams.float()) + post.unsqueeze(-1) * output.float().unsqueeze(1)
    return mixed.to(streams.dtype)


def merge(streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, *, config: ModelConfig) -> Tensor:
    """Collapse the streams after the last block: sum_j (sigmoid(mix_j scale + base_j) + eps) X_j, [T, M, D] to [T, D]."""
    mix = unit_norm(streams.flatten(1).float(), config.rms_norm_eps) @ fn.float().T
    return collapse(streams, torch.sigmoid(mix * scale + base) + config.hc_eps)


def collapse(streams: Tensor, weights: Tensor) -> Tensor:
    """Sum the streams [T, M, D] with weights [T, M] in fp32: [T, D]."""
    return torch.bmm(weights.unsqueeze(1), streams.float()).squeeze(1).to(streams.dtype)
