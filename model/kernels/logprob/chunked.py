"""Token log-probabilities in chunks of rows: library matrix products, and one kernel over the logits each way."""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.kernels.logprob.kernel import token_gradients, token_statistics

READ, WRITE = {"BLOCK": 2048, "STAGES": 4, "num_warps": 4}, {"BLOCK": 4096, "num_warps": 8}


def statistics(logits: Tensor, targets: Tensor, out: Tensor) -> None:
    """Compute log p(target), entropy and log-sum-exp of rows of logits [R, V] into `out` [3, R] fp32."""
    rows, vocabulary = logits.shape
    tile = READ | {"BLOCK": min(READ["BLOCK"], triton.next_power_of_2(vocabulary))}
    token_statistics[(rows,)](logits, targets, *out, vocabulary, logits.stride(0), **tile)


def gradients(logits: Tensor, targets: Tensor, lse: Tensor, grad: Tensor, *, out: Tensor) -> None:
    """Write d(sum_r grad_r log p_r(target)) / d logits to `out` [R, V], which may be `logits` itself."""
    rows, vocabulary = logits.shape
    tile = WRITE | {"BLOCK": min(WRITE["BLOCK"], triton.next_power_of_2(vocabulary))}
    grid = (rows, triton.cdiv(vocabulary, tile["BLOCK"]))
    token_gradients[grid](logits, targets, lse, grad, out, vocabulary, logits.stride(0), **tile)


class TokenLogprobs(torch.autograd.Function):
    """Values forward; logits recomputed backward, or kept where one chunk holds all rows."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, chunk):
        count, vocabulary = len(targets), len(weight)
        step = max(1, min(chunk, count))
        found = torch.empty(3, count, dtype=torch.float32, device=hidden.device)
        logits = hidden.new_empty(step, vocabulary)
        for start in range(0, count, step):
            rows = slice(start, start + step)
            some = torch.mm(hidden[rows], weight.T, out=logits[: min(step, count - start)])
            statistics(some, targets[rows], found[:, rows])
        logprobs, entropy, lse = found.unbind(0)
        ctx.step = step
        kept = logits if any(ctx.needs_input_grad) and step == count else None
        ctx.save_for_backward(hidden, weight, targets, lse, kept)
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _entropy):
        hidden, weight, targets, lse, kept = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.empty_like(weight) if len(targets) else torch.zeros_like(weight)
        grad = grad.contiguous()
        buffer = hidden.new_empty(ctx.step, len(weight))
        for start in range(0, len(targets), ctx.step):
            rows = slice(start, start + ctx.step)
            room = buffer[: min(ctx.step, len(targets) - start)]
            logits = torch.mm(hidden[rows], weight.T, out=room) if kept is None else kept
            gradients(logits, targets[rows], lse[rows], grad[rows], out=room)
            torch.mm(room, weight, out=grad_hidden[rows])
            grad_weight.addmm_(room.T, hidden[rows], beta=float(start > 0))
        return grad_hidden, grad_weight, None, None
