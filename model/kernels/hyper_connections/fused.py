"""Launches of the hyper-connections' kernels, and their gradients; the backward pass recomputes the Sinkhorn iteration."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.config import ModelConfig
from model.kernels.hyper_connections import kernel

ROWS = 32
"""The 24 rows of `fn` and of everything laid out like it, filled up."""

PROJECT = {"TOKENS": 128, "BLOCK": 64, "STAGES": 4, "num_warps": 4}
STREAMS = {"TOKENS": 64, "BLOCK": 64, "STAGES": 3, "num_warps": 4}
PROGRAMS = 256
"""Programs that fill a GPU; fewer tokens are split further along the width."""
FEW = {"TOKENS": 512, "PROGRAMS": 64}
"""As many tokens as decoding has, and their programs: the slices of the width are summed in turn, which then costs more than it saves."""
GROUP = 2048
"""Tokens whose share of the gradient of `fn` one program sums."""
MIX = {"BLOCK": 2048, "num_warps": 8}
COLLAPSE = {"TOKENS": 2, "BLOCK": 1024, "num_warps": 4}
GATES = {"TOKENS": 4, "BLOCK": 256, "num_warps": 4}


def halves(streams: Tensor) -> bool:
    """Say whether `fn` goes into the products as two numbers of the streams' dtype, which together have (almost) all of its bits."""
    return streams.dtype in (torch.bfloat16, torch.float16)


class Gates(NamedTuple):
    """What the streams' projections become, all fp32.

    Attributes:
        pre, post: [T, 4].
        comb: [T, 4, 4].
        mixes: [T, 32] projections before the RMS, for the backward pass.
        inverse: [T] 1 / rms, likewise.
    """

    pre: Tensor
    post: Tensor
    comb: Tensor
    mixes: Tensor
    inverse: Tensor


def projections(streams: Tensor, slices: int) -> tuple[Tensor, Tensor]:
    """Make room for the product with `fn` [S, T, 32] and the sum of squares [S, T], over S slices of the width."""
    raw = torch.empty(slices, len(streams), ROWS, dtype=torch.float32, device=streams.device)
    return raw, raw.new_empty(slices, len(streams))


def _projections(streams: Tensor, fn: Tensor) -> tuple[Tensor, Tensor]:
    """Return the product with `fn` [S, T, 32] and the sum of squares [S, T], over S slices of the width."""
    tokens, width = len(streams), streams[0].numel()
    tiles = triton.cdiv(tokens, PROJECT["TOKENS"])
    programs = FEW["PROGRAMS"] if tokens <= FEW["TOKENS"] else PROGRAMS
    part = triton.cdiv(triton.cdiv(width, max(1, programs // tiles)), PROJECT["BLOCK"]) * PROJECT["BLOCK"]
    slices = triton.cdiv(width, part)
    raw, squares = projections(streams, slices)
    kernel.project[(tiles, slices)](streams, fn, raw, squares, tokens, width, part, halves(streams), **PROJECT)
    return raw, squares


def collapse(streams: Tensor, projected: tuple[Tensor, Tensor], base: Tensor, scale: Tensor, config: ModelConfig) -> tuple[Tensor, Gates]:
    """Turn raw projections [S, T, 32] and squares [S, T] into the gates, and sum the streams [T, 4, D] with `pre` to [T, D]."""
    tokens, _, width = streams.shape
    collapsed, raw = streams.new_empty(tokens, width), projected[0]
    gates = Gates(*(raw.new_empty(size) for size in ((tokens, 4), (tokens, 4), (tokens, 4, 4), (tokens, ROWS), (tokens,))))
    kernel.collapse[(triton.cdiv(tokens, COLLAPSE["TOKENS"]),)](
        streams, *projected, base, scale, collapsed, *gates, tokens, width, len(raw), config.rms_norm_eps, config.hc_eps,
        ITERATIONS=config.hc_sinkhorn_iters, **COLLAPSE,
    )  # fmt: skip
    return collapsed, gates


def gates_backward(
    streams: Tensor, gates: tuple[Tensor, Tensor], base: Tensor, scale: Tensor, *, grads: tuple[Tensor, ...], config: ModelConfig
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Turn the gradients of the collapsed streams [T, D], of post and comb into those before the gates.

    Args:
        streams: [T, 4, D].
        gates: `mixes` and `inverse`.
        base, scale: parameters.
        grads: of the collapsed streams, of post and of comb, contiguous.
        config: as of the forward pass.

    Returns:
        gradients of the projections [T, 32] and of the squares' sum (times 2) [T], of base and of scale.
    """
    mixes, inverse = gates
    tokens, _, width = streams.shape
    programs = triton.cdiv(tokens, GATES["TOKENS"])
    draw, dsquare, totals = torch.empty_like(mixes), torch.empty_like(inverse), mixes.new_empty(programs, 2, ROWS)
    sums = mixes.new_empty(programs * GATES["TOKENS"], 8 * config.hc_sinkhorn_iters)
    kernel.gates_backward[(programs,)](
        grads[0], streams, mixes, inverse, base, scale, *grads[1:], draw, dsquare, sums, totals, tokens, width, config.hc_eps,
        ITERATIONS=config.hc_sinkhorn_iters, **GATES,
    )  # fmt: skip
    both = totals.sum(0)
    return draw, dsquare, both[0, :24].to(base.dtype), both[1, :3].to(scale.dtype)


def filled(streams: Tensor, grads: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    """Make the gradients of the collapsed streams, of post and of comb contiguous, zeros where there is none."""
    tokens, count, width = streams.shape
    sizes = ((tokens, width), (tokens, count), (tokens, count, count))
    dtypes = (streams.dtype, torch.float32, torch.float32)
    return tuple(
        torch.zeros(size, dtype=dtype, device=streams.device) if grad is None else grad.contiguous()
        for grad, size, dtype in zip(grads, sizes, dtypes)
    )


def _mix_block(width: int) -> dict[str, int]:
    return MIX | {"BLOCK": min(MIX["BLOCK"], triton.next_power_of_2(width))}


class MixIn(torch.autograd.Function):
    """Returns the streams too, so that the gradient of their other readers is added where theirs is written."""

    @staticmethod
    def forward(ctx, streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, config: ModelConfig):
        streams, fn = streams.contiguous(), fn.contiguous()
        collapsed, gates = collapse(streams, _projections(streams, fn), base, scale, config)
        ctx.save_for_backward(streams, fn, base, scale, gates.pre, gates.mixes, gates.inverse)
        ctx.config = config
        ctx.set_materialize_grads(False)
        return collapsed, gates.post, gates.comb, streams

    @staticmethod
    @once_differentiable
    def backward(ctx, dcollapsed, dpost, dcomb, through):
        streams, fn, base, scale, pre, *gates = ctx.saved_tensors
        grads = filled(streams, (dcollapsed, dpost, dcomb))
        draw, dsquare, dbase, dscale = gates_backward(streams, gates, base, scale, grads=grads, config=ctx.config)
        dstreams, dfn = streams_backward(streams, grads[0], through, (draw, dsquare, pre), fn)
        return dstreams, dfn.to(fn.dtype), dbase, dscale, None


def streams_backward(
    streams: Tensor, dcollapsed: Tensor, through: Tensor | None, per_token: tuple[Tensor, Tensor, Tensor], fn: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the streams [T, 4, D] and of `fn` [24, 4 D].

    Args:
        streams: [T, 4, D].
        dcollapsed: [T, D] gradient of the collapsed streams.
        through: [T, 4, D] gradient of the streams from their later readers, or None.
        per_token: gradients of the projections [T, 32] and of the squares' sum [T], and `pre`.
        fn: parameter.
    """
    tokens, _, width = streams.shape
    groups = triton.cdiv(tokens, GROUP)
    dstreams = torch.empty_like(streams)
    dfn = torch.empty(groups, ROWS, 4 * width, dtype=torch.float32, device=streams.device)
    kernel.streams_backward[(4 * triton.cdiv(width, STREAMS["BLOCK"]), groups)](
        streams, dcollapsed, dcollapsed if through is None else through.contiguous(), *per_token, fn, dstreams, dfn, tokens, width,
        GROUP, halves(streams), through is not None, **STREAMS,
    )  # fmt: skip
    return dstreams, dfn[0, :24] if groups == 1 else dfn[:, :24].sum(0)


class MixOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx, output: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
        output, streams, post, comb = (t.contiguous() for t in (output, streams, post, comb))
        tokens, _, width = streams.shape
        out = torch.empty_like(streams)
        block = _mix_block(width)
        kernel.expand[(tokens, triton.cdiv(width, block["BLOCK"]))](output, streams, post, comb, out, width, **block)
        ctx.save_for_backward(output, streams, post, comb)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return expand_backward(grad, *ctx.saved_tensors)


def expand_backward(grad: Tensor, output: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> tuple[Tensor, ...]:
    """Return the gradients of the four arguments of `MixOut` from that of its result [T, 4, D]."""
    tokens, _, width = streams.shape
    before = (output, streams, post, comb)
    gradients = tuple(torch.empty_like(t) for t in before)
    block, warps = triton.next_power_of_2(width), 4 if width <= 2048 else 8
    kernel.expand_backward[(tokens,)](grad.contiguous(), *before, *gradients, width, BLOCK=block, num_warps=warps)
    return gradients
