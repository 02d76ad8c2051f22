"""Sparse attention on a GPU: forward, and the gradients' entry."""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.kernels.sparse_attention import kernel_forward, kernel_hopper_forward
from model.kernels.sparse_attention.fused_backward import gradients
from model.kernels.sparse_attention.kernel_forward import LOG2E
from model.kernels.sparse_attention.launch import (
    GATHERED,
    PROCESSORS,
    Keys,
    head_block_of,
    make_keys,
    on_hopper,
    shape_of,
    tiles_of,
)


class FusedAttention(torch.autograd.Function):
    """Forward and backward of `op.sparse_attention`."""

    @staticmethod
    def forward(ctx, q, kv, ckv, sink, indices, row, ratio):
        ctx.dtypes = kv.dtype, None if ckv is None else ckv.dtype
        kv, ckv = kv.to(q.dtype), None if ckv is None else ckv.to(q.dtype)
        keys = make_keys(kv, ckv, indices, row=row, ratio=ratio, backward=any(ctx.needs_input_grad))
        q = q.contiguous()
        out, lse = attend(q, keys, sink)
        ctx.save_for_backward(q, sink, out, lse)
        ctx.keys = keys
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        q, sink, out, lse = ctx.saved_tensors
        dq, dkv, dpool, delta = gradients(q, ctx.keys, (out, grad.contiguous(), lse))
        dsink = -(torch.exp2(sink.float() * LOG2E.value - lse) * delta).sum(0)
        dckv = None if ctx.dtypes[1] is None else dpool.to(ctx.dtypes[1])
        return dq, dkv.to(ctx.dtypes[0]), dckv, dsink.to(sink.dtype), None, None, None


def attend(q: Tensor, keys: Keys, sink: Tensor) -> tuple[Tensor, Tensor]:
    """Return the output and the log2 of the sum of exponentials, [T, H] fp32."""
    length, heads, width = q.shape
    out, lse = torch.empty_like(q), torch.empty(length, heads, device=q.device, dtype=torch.float32)
    arguments = (sink, out, lse, width**-0.5 * LOG2E.value)
    k = keys.rows.shape[-1] if keys.kind == GATHERED else 0
    if on_hopper(q, keys.row.window):
        total = length * heads // 64
        kernel_hopper_forward.forward[(min(total, PROCESSORS),)](
            q, keys.x, *keys.arguments_on_hopper, *arguments, length, length, total, heads=heads, k=k, **keys.sizes, num_warps=4
        )
    else:
        head_block = head_block_of(q)
        kernel_forward.forward[(length, triton.cdiv(heads, head_block))](
            q, *keys.halves, *keys.arguments, *arguments, head_block=head_block, k=k, **keys.sizes, **shape_of(q), **tiles_of(q, "forward")
        )
    return out, lse
