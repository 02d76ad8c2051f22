"""The definition of the hyper-connections' mixing, through autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from model.config import ModelConfig
from model.kernels.sinkhorn.reference import sinkhorn


def mix_in(streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, *, config: ModelConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `op.mix_in` step by step."""
    tokens, count, _ = streams.shape
    flat = streams.flatten(1)
    mix = (flat @ fn.T) * torch.rsqrt(flat.square().mean(1, keepdim=True) + config.rms_norm_eps)
    mix = mix * scale.repeat_interleave(torch.tensor([count, count, count * count])) + base
    pre, post, comb = mix.split([count, count, count * count], 1)
    logits = comb.view(tokens, count, count).permute(1, 2, 0)
    collapsed = ((torch.sigmoid(pre) + config.hc_eps).unsqueeze(2) * streams).sum(1)
    return collapsed, 2 * torch.sigmoid(post), sinkhorn(logits, config.hc_sinkhorn_iters, config.hc_eps).permute(2, 0, 1)


def mix_out(output: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """Compute `op.mix_out` in one line: X'_k = post_k f + sum_j comb_jk X_j."""
    return post.unsqueeze(2) * output.unsqueeze(1) + torch.einsum("tjk,tjd->tkd", comb, streams)
