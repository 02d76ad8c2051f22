"""Choosing the next token of each row from its logits."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def choose(logits, draws, temperature, tokens, logprobs, words, BLOCK: tl.constexpr):
    """Choose by inverting the distribution function at the row's draw, or the most likely token at temperature 0.

    Args:
        logits: [B, V] fp32. draws: [B] fp32 in [0, 1). temperature: [1] fp32, divides the logits.
        tokens: [B] int32 out. logprobs: [B] fp32 out, nats, under the distribution drawn from.
    """
    row = tl.program_id(0).to(tl.int64)
    warm = tl.load(temperature)
    by = tl.where(warm > 0, warm, 1.0)
    top, total, best = -3e38, 0.0, 0
    for start in range(0, words, BLOCK):
        word = start + tl.arange(0, BLOCK)
        value = tl.load(logits + row * words + word, word < words, float("-inf")) / by
        highest = tl.max(value, 0)
        best = tl.where(highest > top, start + tl.argmax(value, 0), best)
        higher = tl.maximum(top, highest)
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(value - higher), 0)
        top = higher
    if warm > 0:
        target = tl.load(draws + row) * total
        before, found, last = 0.0, words, 0
        for start in range(0, words, BLOCK):
            word = start + tl.arange(0, BLOCK)
            weight = tl.exp(tl.load(logits + row * words + word, word < words, float("-inf")) / by - top)
            past = before + tl.cumsum(weight, 0) > target
            found = tl.minimum(found, tl.min(tl.where(past & (weight > 0), word, words), 0))
            last = tl.maximum(last, tl.max(tl.where(weight > 0, word, 0), 0))
            before += tl.sum(weight, 0)
        best = tl.where(found < words, found, last)
    tl.store(tokens + row, best)
    tl.store(logprobs + row, tl.load(logits + row * words + best) / by - top - tl.log(total))
