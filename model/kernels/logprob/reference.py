"""Log-probabilities of given tokens from hidden states and a head, without the [R, V] logits beyond a chunk."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class _TokenLogprobs(torch.autograd.Function):
    """Two passes over the chunks: values forward; logits recomputed backward, or kept where one chunk holds all rows."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
        logprobs = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)  # [R]
        entropy = torch.empty_like(logprobs)
        kept = None
        for start in range(0, len(targets), chunk):
            rows = slice(start, start + chunk)
            log_p = F.log_softmax(F.linear(hidden[rows], weight).float(), dim=-1)  # [chunk, V]
            p = log_p.exp()
            logprobs[rows] = log_p.gather(1, targets[rows, None])[:, 0]
            entropy[rows] = -torch.linalg.vecdot(p, log_p)
            kept = p
        ctx.chunk = chunk
        ctx.save_for_backward(hidden, weight, targets, kept if 0 < len(targets) <= chunk else None)
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _entropy: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]
        hidden, weight, targets, kept = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight)
        for start in range(0, len(targets), ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            p = kept if kept is not None else F.softmax(F.linear(hidden[rows], weight).float(), dim=-1)
            grad_logits = p * -grad[rows, None]  # d log p_t / d z_v = 1[v = t] - p_v
            grad_logits.scatter_add_(1, targets[rows, None], grad[rows, None])
            grad_logits = grad_logits.to(weight.dtype)
            grad_hidden[rows] = grad_logits @ weight
            grad_weight.addmm_(grad_logits.T, hidden[rows])
        return grad_hidden, grad_weight, None, None


def token_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, *, chunk: int = 4096) -> tuple[Tensor, Tensor]:
    """Compute `op.token_logprobs`; the arguments are the same."""
    return _TokenLogprobs.apply(hidden, weight, targets, chunk)  # type: ignore[no-untyped-call]
