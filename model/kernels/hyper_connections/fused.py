"""Launches of the hyper-connections' kernels, and their gradients; the backward pass recomputes the Sinkhorn iteration."""

from __future__ import annotations

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


def _halves(streams: Tensor) -> bool:
    """Say whether `fn` goes into the products as two numbers of the streams' dtype, which together have (almost) all of its bits."""
    return streams.dtype in (torch.bfloat16, torch.float16)


def _projections(streams: Tensor, fn: Tensor) -> tuple[Tensor, Tensor]:
    """Return the product with `fn` [S, T, 32] and the sum of squares [S, T], over S slices of the width."""
    tokens, width = len(streams), streams[0].numel()
    tiles = triton.cdiv(tokens, PROJECT["TOKENS"])
    programs = FEW["PROGRAMS"] if tokens <= FEW["TOKENS"] else PROGRAMS
    part = triton.cdiv(triton.cdiv(width, max(1, programs // tiles)), PROJECT["BLOCK"]) * PROJECT["BLOCK"]
    slices = triton.cdiv(width, part)
    raw = torch.empty(slices, tokens, ROWS, dtype=torch.float32, device=streams.device)
    squares = raw.new_empty(slices, tokens)
    kernel.project[(tiles, slices)](streams, fn, raw, squares, tokens, width, part, _halves(streams), **PROJECT)
    return raw, squares


def _mix_block(width: int) -> dict[str, int]:
    return MIX | {"BLOCK": min(MIX["BLOCK"], triton.next_power_of_2(width))}


class MixIn(torch.autograd.Function):
    """Returns the streams too, so that the gradient of their other readers is added where theirs is written."""

    @staticmethod
    def forward(ctx, streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, config: ModelConfig):
        streams, fn = streams.contiguous(), fn.contiguous()
        tokens, _, width = streams.shape
        raw, squares = _projections(streams, fn)
        collapsed = streams.new_empty(tokens, width)
        sizes = {"pre": (tokens, 4), "post": (tokens, 4), "comb": (tokens, 4, 4), "mixes": (tokens, ROWS), "inverse": (tokens,)}
        gates = {name: raw.new_empty(size) for name, size in sizes.items()}
        kernel.collapse[(triton.cdiv(tokens, COLLAPSE["TOKENS"]),)](
            streams, raw, squares, base, scale, collapsed, *gates.values(), tokens, width, len(raw), config.rms_norm_eps, config.hc_eps,
            ITERATIONS=config.hc_sinkhorn_iters, **COLLAPSE,
        )  # fmt: skip
        ctx.save_for_backward(streams, fn, base, scale, gates["pre"], gates["mixes"], gates["inverse"])
        ctx.eps, ctx.iterations = config.hc_eps, config.hc_sinkhorn_iters
        ctx.set_materialize_grads(False)
        return collapsed, gates["post"], gates["comb"], streams

    @staticmethod
    @once_differentiable
    def backward(ctx, dcollapsed, dpost, dcomb, through):
        streams, fn, base, scale, pre, mixes, inverse = ctx.saved_tensors
        tokens, _, width = streams.shape
        if dcollapsed is None:
            dcollapsed = streams.new_zeros(tokens, width)
        dcollapsed = dcollapsed.contiguous()
        dpost = pre.new_zeros(tokens, 4) if dpost is None else dpost.contiguous()
        dcomb = pre.new_zeros(tokens, 4, 4) if dcomb is None else dcomb.contiguous()
        programs = triton.cdiv(tokens, GATES["TOKENS"])
        draw, dsquare, totals = torch.empty_like(mixes), torch.empty_like(inverse), pre.new_empty(programs, 2, ROWS)
        sums = pre.new_empty(programs * GATES["TOKENS"], 8 * ctx.iterations)
        kernel.gates_backward[(programs,)](
            dcollapsed, streams, mixes, inverse, base, scale, dpost, dcomb, draw, dsquare, sums, totals, tokens, width, ctx.eps,
            ITERATIONS=ctx.iterations, **GATES,
        )  # fmt: skip
        dstreams, dfn = _streams_backward(streams, dcollapsed, through, (draw, dsquare, pre), fn)
        both = totals.sum(0)
        return dstreams, dfn.to(fn.dtype), both[0, :24].to(base.dtype), both[1, :3].to(scale.dtype), None


def _streams_backward(
    streams: Tensor, dcollapsed: Tensor, through: Tensor | None, per_token: tuple[Tensor, Tensor, Tensor], fn: Tensor
) -> tuple[Tensor, Tensor]:
    tokens, _, width = streams.shape
    groups = triton.cdiv(tokens, GROUP)
    dstreams = torch.empty_like(streams)
    dfn = torch.empty(groups, ROWS, 4 * width, dtype=torch.float32, device=streams.device)
    kernel.streams_backward[(4 * triton.cdiv(width, STREAMS["BLOCK"]), groups)](
        streams, dcollapsed, dcollapsed if through is None else through.contiguous(), *per_token, fn, dstreams, dfn, tokens, width,
        GROUP, _halves(streams), through is not None, **STREAMS,
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
        output, streams, post, comb = ctx.saved_tensors
        tokens, _, width = streams.shape
        gradients = tuple(torch.empty_like(t) for t in (output, streams, post, comb))
        kernel.expand_backward[(tokens,)](
            grad.contiguous(),
            output,
            streams,
            post,
            comb,
            *gradients,
            width,
            BLOCK=triton.next_power_of_2(width),
            num_warps=4 if width <= 2048 else 8,
        )
        return gradients
