"""Launches of the router's kernels, and their gradients. Nothing waits for the device, and tokens are never copied to fp32."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.kernels.router import kernel
from model.kernels.router.rule import Rule
from model.linear import wide_product

TILE = 1024
"""Scores a program handles at a time."""
PARTS = 1024
"""Programs over which the tokens of all samples are spread, about."""


class Routing(NamedTuple):
    """Where tokens go.

    Attributes:
        indices: [T, A] int64, distinct experts a token.
        weights: [T, A] fp32.
        scores: [T, E] fp32.
        counts: [programs, E] fp32, parts of the tokens that each expert gets.
    """

    indices: Tensor
    weights: Tensor
    scores: Tensor
    counts: Tensor


def route(x: Tensor, weight: Tensor, rule: Rule, *, bias: Tensor | None = None, indices: Tensor | None = None) -> Routing:
    """Score tokens by s(x W^T), choose the experts of the highest score + bias and weigh them by their scores.

    Args:
        x: [T, D] fp32, or half precision: the product is then one of half-precision numbers, summed in fp32, for which a wider weight is
            split in two.
        weight: [E, D].
        rule: what scores and weights are made of.
        bias: [E] fp32, part of the choice only; needed unless `indices` [T, A] int64 says what is chosen.
    """
    return Routing(*_Route.apply(x, weight, bias, indices, rule))


def halves(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Write a weight [E, D] in `dtype`; a wider one as two, one after the other [2 E, D], whose sum has (almost) all of its bits."""
    if weight.dtype.itemsize <= dtype.itemsize:
        return weight.to(dtype)
    high = weight.to(dtype)
    return torch.cat([high, (weight - high).to(dtype)])


def _tile(experts: int) -> dict[str, int]:
    block = triton.next_power_of_2(experts)
    return {"ROWS": max(1, TILE // block), "BLOCK": block, "num_warps": 4}


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, indices: Tensor | None, rule: Rule):
        tokens, experts = len(x), len(weight)
        raw = wide_product(x, halves(weight, x.dtype))
        tile = _tile(experts)
        programs = triton.cdiv(tokens, tile["ROWS"])
        choose = indices is None
        indices = torch.empty(tokens, rule.active, dtype=torch.int64, device=x.device) if indices is None else indices.contiguous()
        weights, scores, counts = raw.new_empty(tokens, rule.active), raw.new_empty(tokens, experts), raw.new_empty(programs, experts)
        ctx.how = {
            "SIGMOID": rule.scoring == "sigmoid",
            "NORMALISE": rule.normalises,
            "EXPERTS": experts,
            "PARTS": raw.shape[1] // experts,
            "ACTIVE": rule.active,
            **tile,
        }
        kernel.route[(programs,)](
            raw, scores if bias is None else bias, indices, weights, scores, counts, tokens, rule.scaling, CHOOSE=choose,
            PLACES=triton.next_power_of_2(rule.active), **ctx.how,
        )  # fmt: skip
        ctx.save_for_backward(x, weight, raw, indices)
        ctx.scaling = rule.scaling
        ctx.mark_non_differentiable(counts)
        if choose:
            ctx.mark_non_differentiable(indices)
        ctx.set_materialize_grads(False)
        return indices, weights, scores, counts

    @staticmethod
    @once_differentiable
    def backward(ctx, _, dweights, dscores, __):
        x, weight, raw, indices = ctx.saved_tensors
        tokens, experts = len(x), len(weight)
        narrow = x.dtype != torch.float32
        dlogits = torch.empty(tokens, (2 if narrow else 1) * experts, dtype=x.dtype, device=x.device)
        dweights = torch.zeros_like(indices, dtype=torch.float32) if dweights is None else dweights.contiguous()
        kernel.route_backward[(triton.cdiv(tokens, ctx.how["ROWS"]),)](
            raw, indices, dweights, raw if dscores is None else dscores.contiguous(), dlogits, tokens, ctx.scaling,
            BALANCED=dscores is not None, HALVES=narrow, **ctx.how,
        )  # fmt: skip
        matrix = weight.to(x.dtype)
        dx = dlogits @ (torch.cat([matrix, matrix]) if narrow else matrix)
        dweight = wide_product(dlogits.T, x.T).view(-1, experts, x.shape[1])
        return dx, (dweight.sum(0) if narrow else dweight[0]).to(weight.dtype), None, None, None


def balance_loss(scores: Tensor, indices: Tensor, cu_seqlens: Tensor, sample: Tensor) -> Tensor:
    """Compute the sequence-wise balance loss, averaged over samples by their tokens.

    A sample of n tokens has sum_e f_e P_e, f_e = E / (A n) * #{t: e chosen}, P_e = mean_t s_te / sum_e s_te.

    Args:
        scores: [T, E] fp32.
        indices: [T, A] int64, distinct.
        cu_seqlens: [N + 1] int64 from 0 to T, ascending.
        sample: [T] int64, which sample a token belongs to.

    Returns:
        [] fp32.

    Source: DeepSeek-V3 report eq. 17-20.
    """
    return _Balance.apply(scores, indices, cu_seqlens, sample)


class _Balance(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scores: Tensor, indices: Tensor, cu_seqlens: Tensor, sample: Tensor) -> Tensor:
        (tokens, experts), active, samples = scores.shape, indices.shape[1], len(cu_seqlens) - 1
        scores, indices, tile = scores.contiguous(), indices.contiguous(), _tile(experts)
        parts = max(1, PARTS // samples)
        sums = scores.new_empty(parts, samples, 2, experts)
        kernel.balance[(samples, parts)](scores, indices, cu_seqlens, sums, samples, EXPERTS=experts, ACTIVE=active, **tile)
        chosen, shares = sums.sum(0).unbind(1)
        each = chosen * (experts / active / tokens) / cu_seqlens.diff().unsqueeze(1)
        ctx.save_for_backward(scores, sample, each)
        return (each * shares).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        scores, sample, each = ctx.saved_tensors
        tokens, experts = scores.shape
        dscores, tile = torch.empty_like(scores), _tile(experts)
        kernel.balance_backward[(triton.cdiv(tokens, tile["ROWS"]),)](scores, sample, each * grad, dscores, tokens, EXPERTS=experts, **tile)
        return dscores, None, None, None
