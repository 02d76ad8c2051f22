"""Mixing of the residual streams in plain torch with hand-written gradients: the wide streams are read as few times as possible."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.config import ModelConfig
from model.cpu import small_products
from model.kernels.sinkhorn.op import normalise, normalise_backward


def mix_in(streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, *, config: ModelConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `op.mix_in` on fp32 or fp64 streams."""
    if not torch.is_grad_enabled():
        tokens, count, _ = streams.shape
        _, _, _, mix = _mixes(streams, fn, base, scale, config.rms_norm_eps)
        gates = mix[: 2 * count].sigmoid()
        comb, _, _ = normalise(mix[2 * count :].view(count, count, tokens), config.hc_sinkhorn_iters, config.hc_eps)
        return _collapse(streams, gates[:count] + config.hc_eps)[0], (gates[count:].T * 2).contiguous(), comb.permute(2, 0, 1).contiguous()
    return _MixIn.apply(streams, fn, base, scale, config)


def mix_out(output: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """Compute `op.mix_out` on fp32 or fp64 streams."""
    if not torch.is_grad_enabled():
        return _mixed(output, streams, post, comb)
    return _MixOut.apply(output, streams, post, comb)


CHUNK = 1 << 19
"""Numbers of the streams handled at a time, so that what is read twice is still in a cache (2 MiB in fp32)."""


def _chunks(streams: Tensor) -> list[slice]:
    step = max(1, CHUNK // (streams.shape[1] * streams.shape[2]))
    return [slice(first, first + step) for first in range(0, len(streams), step)]


def _mixes(streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, norm_eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return 1 / rms [T], the product with `fn` [2M + M^2, T], the scale of each of its rows, and the scaled and shifted mix."""
    tokens, count, width = streams.shape
    flat = streams.flatten(1)
    inverse, raw = streams.new_empty(tokens), streams.new_empty(tokens, len(fn))
    for part in _chunks(streams):
        torch.linalg.vector_norm(flat[part], dim=1, out=inverse[part])
        torch.mm(flat[part], fn.T, out=raw[part])
    inverse.square_().div_(count * width).add_(norm_eps).rsqrt_()
    raw = raw.T.contiguous()
    each = torch.cat([part.expand(size) for part, size in zip(scale.split(1), (count, count, count * count))]).unsqueeze(1)
    return inverse, raw, each, torch.addcmul(base.unsqueeze(1), raw * inverse, each)


def _collapse(streams: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Sum the streams with weights [M, T]; returns the sum [T, D] and the weights as [T, M]."""
    pre = weights.T.contiguous()
    with small_products():
        return torch.bmm(pre.unsqueeze(1), streams).squeeze(1), pre


def _mixed(output: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    mixed = torch.empty_like(streams)
    with small_products():
        for part in _chunks(streams):
            torch.bmm(comb[part].mT, streams[part], out=mixed[part]).addcmul_(post[part].unsqueeze(2), output[part].unsqueeze(1))
    return mixed


class _MixIn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, streams, fn, base, scale, config):
        iterations, eps = config.hc_sinkhorn_iters, config.hc_eps
        tokens, count, _ = streams.shape
        inverse, raw, each, mix = _mixes(streams, fn, base, scale, config.rms_norm_eps)
        gates = mix[: 2 * count].sigmoid()
        comb, soft, sums = normalise(mix[2 * count :].view(count, count, tokens), iterations, eps)
        collapsed, pre = _collapse(streams, gates[:count] + eps)
        ctx.iterations = iterations
        ctx.save_for_backward(streams, fn, each, raw, inverse, gates, pre, comb, soft, *sums)
        return collapsed, (gates[count:].T * 2).contiguous(), comb.permute(2, 0, 1).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx, dcollapsed, dpost, dcomb):
        streams, fn, each, raw, inverse, gates, pre, comb, soft, *sums = ctx.saved_tensors
        tokens, count, width = streams.shape
        with small_products():
            dpre = torch.bmm(dcollapsed.unsqueeze(1), streams.mT).squeeze(1)
        dgates = torch.cat([dpre.T, dpost.T * 2]).mul_(gates).mul_(1 - gates)
        dlogits = normalise_backward(dcomb.permute(1, 2, 0), comb, soft, sums, iterations=ctx.iterations)
        dmix = torch.cat([dgates, dlogits.view(-1, tokens)])  # [2M + M^2, T]
        dbase = dmix.sum(1)
        per_row = (dmix * raw).mul_(inverse)
        dscale = torch.stack([part.sum() for part in per_row.split([count, count, count * count])])
        dinverse = (per_row * each).sum(0).div_(inverse)  # of 1 / rms
        dsquare = (dinverse * inverse.pow(3)).div_(-count * width).view(-1, 1, 1)
        draw = dmix.mul_(each).mul_(inverse).T.contiguous()  # [T, 2M + M^2]
        dfn, dstreams = torch.zeros_like(fn), torch.empty_like(streams)
        for part in _chunks(streams):
            some, dsome = streams[part], dstreams[part]
            torch.mul(pre[part].unsqueeze(2), dcollapsed[part].unsqueeze(1), out=dsome)
            dfn.addmm_(draw[part].T, some.flatten(1))
            dsome.view(len(dsome), -1).addmm_(draw[part], fn)
            dsome.addcmul_(some, dsquare[part])
        return dstreams, dfn, dbase, dscale, None


class _MixOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx, output, streams, post, comb):
        ctx.save_for_backward(output, streams, post, comb)
        return _mixed(output, streams, post, comb)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        output, streams, post, comb = ctx.saved_tensors
        grad = grad.contiguous()
        doutput, dstreams, dpost, dcomb = (torch.empty_like(t) for t in (output, streams, post, comb))
        with small_products():
            for part in _chunks(streams):
                torch.bmm(output[part].unsqueeze(1), grad[part].mT, out=dpost[part].unsqueeze(1))
                torch.bmm(post[part].unsqueeze(1), grad[part], out=doutput[part].unsqueeze(1))
                torch.bmm(streams[part], grad[part].mT, out=dcomb[part])
                torch.bmm(comb[part], grad[part], out=dstreams[part])
        return doutput, dstreams, dpost, dcomb
