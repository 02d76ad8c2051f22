"""The Sinkhorn iteration and its gradient on tiles of small matrices, to be called by other kernels."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sinkhorn_tile(logits, sums, eps, ITERATIONS: tl.constexpr, KEEP: tl.constexpr):
    """Normalise [B, M, M] fp32; with KEEP, write the divisors of step s, [B, M], through pointers `sums` [B, M] + s M.

    Returns the result and the softmax that it began with.
    """
    M: tl.constexpr = logits.shape[2]
    soft = tl.exp(logits - tl.max(logits, 2)[:, :, None])
    soft = soft / tl.sum(soft, 2)[:, :, None]
    comb = soft + eps
    for step in range(2 * ITERATIONS - 1):
        if step % 2 == 0:
            total = tl.sum(comb, 1) + eps
            comb = comb / total[:, None, :]
            if KEEP:
                tl.store(sums + step * M, total)
        else:
            total = tl.sum(comb, 2) + eps
            comb = comb / total[:, :, None]
            if KEEP:
                tl.store(sums + step * M, total)
    return comb, soft


@triton.jit
def sinkhorn_backward_tile(grad, comb, soft, sums, ITERATIONS: tl.constexpr):
    """Return the gradient of the logits: a step P' = P / s has dP = (dP' - sum(dP' P')) / s, and P = P' s walks back a step."""
    M: tl.constexpr = grad.shape[2]
    for back in range(2 * ITERATIONS - 1):
        step = 2 * ITERATIONS - 2 - back
        total = tl.load(sums + step * M)
        if step % 2 == 0:
            grad = (grad - tl.sum(grad * comb, 1)[:, None, :]) / total[:, None, :]
            comb = comb * total[:, None, :]
        else:
            grad = (grad - tl.sum(grad * comb, 2)[:, :, None]) / total[:, :, None]
            comb = comb * total[:, :, None]
    return soft * (grad - tl.sum(grad * soft, 2)[:, :, None])
