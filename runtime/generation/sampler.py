"""Choosing tokens: greedy, or by inverting the distribution function at a number drawn per sample and position."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from model.kernels.decode import sampling


def uniforms(seed: int, sample: int, count: int) -> NDArray[np.float32]:
    """Draw the numbers in [0, 1) that decide one sample's tokens.

    They depend on (seed, sample) alone, so a sample comes out the same whatever shares its batch, on any number of ranks.
    """
    return np.random.default_rng([seed, sample]).random(count, dtype=np.float32)


def choose(logits: Tensor, draws: Tensor | None, temperature: float) -> tuple[Tensor, Tensor]:
    """Choose one token a row.

    Args:
        logits: [B, V] fp32.
        draws: [B] fp32 in [0, 1), or None for the most likely token.
        temperature: divides the logits; ignored when greedy.

    Returns:
        tokens [B] int64, and their log-probs [B] fp32, nats, under the distribution they were drawn from.
    """
    if logits.device.type == "cpu":
        return _choose_compiled(logits, draws, 1.0 if draws is None else temperature)
    log_p = F.log_softmax(logits if draws is None else logits / temperature, dim=-1)
    if draws is None:
        tokens = log_p.argmax(-1)
    else:
        cumulative = log_p.exp().cumsum(-1)  # [B, V]
        tokens = torch.searchsorted(cumulative, draws[:, None] * cumulative[:, -1:], right=True)[:, 0]
        tokens = tokens.clamp_(max=logits.shape[1] - 1)
    return tokens, log_p.gather(1, tokens[:, None])[:, 0]


def _choose_compiled(logits: Tensor, draws: Tensor | None, temperature: float) -> tuple[Tensor, Tensor]:
    rows, words = logits.shape
    room = np.empty(words, np.float32), np.empty(-(-words // sampling.BLOCK))
    out = np.empty(rows, np.int64), np.empty(rows, np.float32)
    wanted = np.empty(0, np.float32) if draws is None else draws.float().numpy()
    sampling.choose(np.ascontiguousarray(logits.detach().numpy()), wanted, np.float32(temperature), room, out)
    return torch.from_numpy(out[0]), torch.from_numpy(out[1])
