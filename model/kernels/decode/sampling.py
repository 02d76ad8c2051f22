"""Choosing a token of each row from its logits, in compiled loops."""

from __future__ import annotations

import numpy as np

from model.kernels.decode.arithmetic import ZERO, exp_all
from model.kernels.decode.compiled import compiled

BLOCK = 128
"""Probabilities summed at a time, so that a draw is found in a block first."""


@compiled()
def choose(logits, draws, temperature, room, out):
    """Choose one token a row, by a draw or the most likely one.

    Args:
        logits: [B, V] fp32.
        draws: [B] fp32 in [0, 1), or with no rows for the most likely token.
        temperature: fp32, divides the logits.
        room: [V] and [ceil(V / 128)], fp32 and fp64.
        out: tokens [B] int64, log-probs [B] fp32 under the distribution at that temperature.
    """
    weights, sums = room
    tokens, logprobs = out
    count = logits.shape[1]
    for b in range(len(logits)):
        row = logits[b]
        best = 0
        for v in range(count):
            weights[v] = row[v] / temperature
        highest = weights[0]
        for v in range(count):
            highest = max(highest, weights[v])
        if len(draws) == 0:
            while best < count - 1 and not weights[best] >= highest:
                best += 1
        for v in range(count):
            weights[v] -= highest
        exp_all(weights)
        total = _block_sums(weights, sums)
        token = _find(weights, sums, np.float64(draws[b]) * total) if len(draws) else best
        tokens[b] = token
        logprobs[b] = np.float32(row[token] / temperature - highest - np.float32(np.log(total)))


@compiled()
def _block_sums(weights, sums):
    """Sum blocks of weights, and return the sum of them all."""
    total = np.float64(0)
    for block in range(len(sums)):
        part = ZERO
        for v in range(block * BLOCK, min((block + 1) * BLOCK, len(weights))):
            part += weights[v]
        sums[block] = part
        total += np.float64(part)
    return total


@compiled()
def _find(weights, sums, target):
    """Return the first token up to which, itself included, the weights exceed `target`, else the last one of any weight."""
    block, before = 0, 0.0
    while block < len(sums) - 1 and not before + sums[block] > target:
        before += sums[block]
        block += 1
    last = block * BLOCK
    for v in range(block * BLOCK, min((block + 1) * BLOCK, len(weights))):
        before += weights[v]
        if weights[v] > ZERO:
            last = v
        if before > target:
            return v
    return last
