"""The routed experts as grouped matrix products over the tokens sorted by expert, and their gated activation."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from model.kernels.choice import implementation_for

_aten = torch.ops.aten


def swiglu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """Clamp and gate: silu(min(gate, limit)) * clamp(up, -limit, limit), same shapes. Source: v4_spec 4."""
    return _Swiglu.apply(gate, up, limit) if torch.is_grad_enabled() else _activation(gate, up, limit)


def routed_experts(
    x: Tensor, indices: Tensor, weights: Tensor, matrices: tuple[Tensor, Tensor, Tensor], *, limit: float, beside: Tensor | None = None
) -> Tensor:
    """Sum each token's chosen experts, sum_a W2_e (w_a silu(min(W1_e x, l)) * clamp(W3_e x, -l, l)).

    Args:
        x: [T, D].
        indices: [T, A] int64, distinct experts a token.
        weights: [T, A] fp32.
        matrices: w1 [E, F, D], w2 [E, D, F], w3 [E, F, D].
        limit: clamp of the two branches.
        beside: [T, D] added to the result.

    Returns:
        [T, D] in the dtype of `x`, summed in fp32.

    Source: v4_spec 4.
    """
    if implementation_for(x) == "triton":
        from model.kernels.experts import fused  # brings Triton, which a CPU does without

        return fused.RoutedExperts.apply(x, indices, weights, *matrices, limit, beside)
    if not torch.is_grad_enabled() and indices.numel() <= FEW:
        out = _padded(x, indices, weights, matrices, limit)
    else:
        out = _Experts.apply(x, indices, weights, *matrices, limit)
    return out if beside is None else out + beside


FEW = 1024
"""Up to so many (token, choice) pairs, decoding pads every expert to the fullest: fewer calls than one a group (measured on a CPU)."""


def _padded(x: Tensor, indices: Tensor, weights: Tensor, matrices: tuple[Tensor, Tensor, Tensor], limit: float) -> Tensor:
    w1, w2, w3 = matrices
    pairs, active = indices.flatten(), indices.shape[1]
    ranks = pairs.new_zeros(len(pairs), len(w1)).scatter_(1, pairs.unsqueeze(1), 1).cumsum_(0)
    room = -(-int(ranks[-1].max()) // 8) * 8
    slot = ranks.gather(1, pairs.unsqueeze(1)).squeeze(1).add_(pairs, alpha=room).sub_(1)
    rows = x.new_zeros(len(w1) * room, x.shape[1]).index_copy_(0, slot, x.repeat_interleave(active, 0)).view(len(w1), room, -1)
    hidden = _activation(torch.bmm(rows, w1.mT), torch.bmm(rows, w3.mT), limit)  # [E, room, F]
    out = torch.bmm(hidden, w2.mT).flatten(0, 1).index_select(0, slot).view(len(x), active, -1)
    return (out.float() * weights.unsqueeze(2)).sum(1).to(x.dtype)


def _activation(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    return functional.silu(gate.clamp(max=limit)).mul_(up.clamp(-limit, limit))


def _activation_backward(grad: Tensor, gate: Tensor, up: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    """Return the gradients of `_activation` in gate and up; overwrites `grad`."""
    clamped = gate.clamp(max=limit)
    dup = functional.silu(clamped).mul_(grad)
    dup = _aten.hardtanh_backward(dup, up, -limit, limit)
    dgate = _aten.silu_backward(grad.mul_(up.clamp(-limit, limit)), clamped)
    return _aten.hardtanh_backward(dgate, gate, float("-inf"), limit), dup


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor, limit: float) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.limit = limit
        return _activation(gate, up, limit)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        return *_activation_backward(grad.clone(), gate, up, ctx.limit), None


GROUP = 64
"""Every expert's rows are padded with zeros to a multiple of this: matrix libraries prepare a kernel for each new shape, which costs
more than the arithmetic of a small group, and group sizes never repeat by themselves."""


def _slots(indices: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Give each (token, choice) pair a row among its expert's, [T * A], and each expert's padded end, [E] int32."""
    flat = indices.flatten()
    counts = torch.bincount(flat, minlength=experts)
    padded = (counts + GROUP - 1) // GROUP * GROUP
    order = torch.argsort(flat, stable=True)
    shift = (padded.cumsum(0) - padded) - (counts.cumsum(0) - counts)  # padded start of each expert minus its unpadded start
    places = torch.arange(len(flat), device=flat.device) + shift[flat[order]]
    return torch.empty_like(order).index_copy_(0, order, places), padded.cumsum(0).to(torch.int32)


class _Experts(torch.autograd.Function):
    """Lay the (token, choice) pairs out by expert; each pair has one row, so gathering replaces every scattered sum."""

    @staticmethod
    def forward(ctx, x, indices, weights, w1, w2, w3, limit):
        tokens, active = indices.shape
        slots, ends = _slots(indices, len(w1))
        room = int(ends[-1])
        rows = x.new_zeros(room, x.shape[1]).index_copy_(0, slots, x.repeat_interleave(active, 0))
        share = x.new_zeros(room).index_copy_(0, slots, weights.flatten().to(x.dtype)).unsqueeze(1)
        gate, up = (functional.grouped_mm(rows, w.mT, offs=ends) for w in (w1, w3))
        hidden = _activation(gate, up, limit)
        out = functional.grouped_mm(hidden * share, w2.mT, offs=ends)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(rows, share, gate, up, hidden, w1, w2, w3, slots, ends)
            ctx.limit = limit
        return _sum_choices(out, slots, tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        rows, share, gate, up, hidden, w1, w2, w3, slots, ends = ctx.saved_tensors
        tokens = len(grad)
        spread = grad.repeat_interleave(len(slots) // tokens, 0)
        dout = grad.new_zeros(len(rows), grad.shape[1]).index_copy_(0, slots, spread)
        dhidden = functional.grouped_mm(dout, w2, offs=ends)
        dw2 = functional.grouped_mm(dout.mT, hidden * share, offs=ends)
        dshare = (dhidden * hidden).sum(1, dtype=torch.float32)
        dgate, dup = _activation_backward(dhidden.mul_(share), gate, up, ctx.limit)
        dw1, dw3 = (functional.grouped_mm(d.mT, rows, offs=ends) for d in (dgate, dup))
        drows = functional.grouped_mm(dgate, w1, offs=ends) + functional.grouped_mm(dup, w3, offs=ends)
        return _sum_choices(drows, slots, tokens), None, dshare[slots].view(tokens, -1), dw1, dw2, dw3, None


def _sum_choices(pairs: Tensor, place: Tensor, tokens: int) -> Tensor:
    """Bring the rows [T * A, D] back into the tokens' order and sum each token's A in fp32: [T, D]."""
    first, *others = place.view(tokens, -1).unbind(1)
    total = pairs.index_select(0, first).float()
    for choice in others:
        total += pairs.index_select(0, choice)
    return total.to(pairs.dtype)
