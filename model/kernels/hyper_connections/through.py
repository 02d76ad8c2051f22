"""Launches of mixing out of one sub-layer and into the next at once, and their gradients."""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.config import ModelConfig
from model.kernels.hyper_connections import through_kernel
from model.kernels.hyper_connections.fused import (
    GROUP,
    PROGRAMS,
    ROWS,
    collapse,
    expand_backward,
    filled,
    gates_backward,
    halves,
    projections,
    streams_backward,
)

FUSED = True
"""Whether the two operations run as one: 14 [T, D] read or written, where one after the other has 18."""
FUSED_BACKWARD = False
"""Whether their gradients do, too: 24 and 80 / BLOCK instead of 32, but then the arithmetic takes about as long as the memory."""
EXPAND = {"TOKENS": 32, "BLOCK": 64, "STAGES": 2, "num_warps": 4}
BACKWARD = {"TOKENS": 16, "BLOCK": 64, "num_warps": 4}
SPAN = 512
"""Tokens that one program of the backward pass takes, with the same columns of `fn`."""
WEIGHTS = {"TOKENS": 64, "BLOCK": 64, "STAGES": 4, "num_warps": 4}
SUM_TOKENS = 64


def suits(streams: Tensor) -> bool:
    """Say whether the kernels are worth it: products of fp32 streams, in full precision, would need more registers than there are."""
    return FUSED and halves(streams)


class MixThrough(torch.autograd.Function):
    """Returns what `fused.MixIn` does, of the streams that `fused.MixOut` would have written; these are the last result."""

    @staticmethod
    def forward(ctx, output, streams, post, comb, fn: Tensor, base: Tensor, scale: Tensor, config: ModelConfig):
        before = tuple(t.contiguous() for t in (output, streams, post, comb))
        fn = fn.contiguous()
        after, projected = _expand(before, fn)
        collapsed, gates = collapse(after, projected, base, scale, config)
        ctx.save_for_backward(*before, fn, base, scale, after, gates.pre, gates.mixes, gates.inverse)
        ctx.config = config
        ctx.set_materialize_grads(False)
        return collapsed, gates.post, gates.comb, after

    @staticmethod
    @once_differentiable
    def backward(ctx, dcollapsed, dpost, dcomb, through):
        *before, fn, base, scale, after, pre, mixes, inverse = ctx.saved_tensors
        grads = filled(after, (dcollapsed, dpost, dcomb))
        draw, dsquare, dbase, dscale = gates_backward(after, (mixes, inverse), base, scale, grads=grads, config=ctx.config)
        per_token = (draw, dsquare, pre)
        if FUSED_BACKWARD:
            gradients, dfn = _backward(before, grads[0], through, per_token, fn), _weights_backward(after, draw)
        else:
            dafter, dfn = streams_backward(after, grads[0], through, per_token, fn)
            gradients = expand_backward(dafter, *before)
        return *gradients, dfn.to(fn.dtype), dbase, dscale, None


def _stacked(fn: Tensor, streams: Tensor) -> tuple[Tensor, bool]:
    """Return `fn` in the streams' dtype, [24, 4 D] or, where that loses bits, [48, 4 D] with these below; and whether it is the latter."""
    near = fn.to(streams.dtype)
    low = halves(streams) and fn.dtype != streams.dtype
    return torch.cat([near, (fn - near).to(streams.dtype)]) if low else near, low


def _expand(before: tuple[Tensor, ...], fn: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Return the streams after the sub-layer [T, 4, D], and their projections and squares over slices of the width."""
    streams = before[1]
    tokens, _, width = streams.shape
    tiles = triton.cdiv(tokens, EXPAND["TOKENS"])
    part = triton.cdiv(triton.cdiv(width, max(1, PROGRAMS // tiles)), EXPAND["BLOCK"]) * EXPAND["BLOCK"]
    slices = triton.cdiv(width, part)
    after, projected = torch.empty_like(streams), projections(streams, slices)
    fn, low = _stacked(fn, streams)
    through_kernel.expand_project[(tiles, slices)](*before, fn, after, *projected, tokens, width, part, low, **EXPAND)
    return after, projected


def _backward(
    before: list[Tensor], dcollapsed: Tensor, through: Tensor | None, per_token: tuple[Tensor, Tensor, Tensor], fn: Tensor
) -> tuple[Tensor, ...]:
    """Return the gradients of the output, the streams, post and comb."""
    streams, post = before[1:3]
    tokens, _, width = streams.shape
    blocks = triton.cdiv(width, BACKWARD["BLOCK"])
    doutput, dstreams, dpost, dcomb = (torch.empty_like(t) for t in before)
    parts = post.new_empty(blocks, 20, tokens)
    fn, low = _stacked(fn, streams)
    through_kernel.through_backward[(blocks, triton.cdiv(tokens, SPAN))](
        *before, dcollapsed, dcollapsed if through is None else through.contiguous(), *per_token, fn, doutput, dstreams, parts,
        tokens, width, SPAN, low, through is not None, **BACKWARD,
    )  # fmt: skip
    through_kernel.sum_parts[(triton.cdiv(tokens, SUM_TOKENS), 20)](
        parts, dpost, dcomb, tokens, blocks, SLICES=triton.next_power_of_2(blocks), TOKENS=SUM_TOKENS
    )
    return doutput, dstreams, dpost, dcomb


def _weights_backward(streams: Tensor, draw: Tensor) -> Tensor:
    """Return draw^T X [24, 4 D] of the streams X [T, 4, D]."""
    tokens, width = len(streams), streams[0].numel()
    groups = triton.cdiv(tokens, GROUP)
    dfn = draw.new_empty(groups, ROWS, width)
    grid = (triton.cdiv(width, WEIGHTS["BLOCK"]), groups)
    through_kernel.weights_backward[grid](streams, draw, dfn, tokens, width, GROUP, **WEIGHTS)
    return dfn[0, :24] if groups == 1 else dfn[:, :24].sum(0)
