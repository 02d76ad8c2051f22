"""Launches of the kernels of a static decoding step; arguments as in `op`."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from model.cache import FRONT
from model.kernels.static_decode import kernel_attention, kernel_tokens
from model.kernels.static_decode.rows import Pool, Rows

LONG = {"TOKENS": 64, "PAIRS": 16}
"""Tokens and pairs of channels of a long block that one program pools at a time; blocks of overlapping entries are pooled at once."""
LIST = 256
"""Places of a list that one program fills."""
WORDS = {"BLOCK": 8192, "num_warps": 8}
"""Logits that one program looks at together: a whole small vocabulary."""


def put_window(kv: Tensor, weight: Tensor, keys: Tensor, rows: Rows, *, window: int) -> None:
    """Compute `op.put_window`."""
    half = kv.shape[1] // 2
    kernel_attention.put_window[(len(kv),)](
        kv, weight, keys, rows.positions, rows.turns, kv.stride(0), keys.stride(0), FRONT, window, half, half - rows.turns.shape[1],
        rows.eps, PAIRS=triton.next_power_of_2(half), num_warps=_warps(half),
    )  # fmt: skip


def compress(kv: Tensor, gate: Tensor, pool: Pool, rows: Rows) -> None:
    """Compute `op.compress`."""
    ring, half = pool.kv.shape[1], pool.entries.shape[2] // 2
    overlaps, all_pairs, first = ring > pool.ratio, triton.next_power_of_2(half), half - rows.turns.shape[1]
    pairs = all_pairs if overlaps else min(all_pairs, LONG["PAIRS"])
    parts = triton.cdiv(half, pairs)
    pooled = pool.kv if parts == 1 else torch.empty(len(kv), 2 * half, device=kv.device, dtype=torch.float32)
    kernel_attention.compress[(len(kv), parts)](
        kv, gate, pool.ape, pool.weight, pool.kv, pool.gate, pool.entries, pooled, rows.positions, rows.turns, kv.stride(0),
        pool.entries.stride(0), half, first, rows.eps, RATIO=pool.ratio, OVERLAPS=overlaps, WHOLE=parts == 1,
        TOKENS=ring if overlaps else min(ring, LONG["TOKENS"]), PAIRS=pairs, num_warps=4,
    )  # fmt: skip
    if parts > 1:
        kernel_attention.place_entries[(len(kv),)](
            pooled, pool.weight, pool.entries, rows.positions, rows.turns, pool.entries.stride(0), half, first, rows.eps, RATIO=pool.ratio,
            PAIRS=all_pairs, num_warps=_warps(half),
        )  # fmt: skip


def list_keys(positions: Tensor, keys: Tensor, *, window: int, ratio: int, chosen: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """Compute `op.list_keys`."""
    numbers, number = (positions, positions) if chosen is None else chosen
    most = window + ((keys.shape[1] - FRONT - window) if chosen is None else numbers.shape[1])
    rows = torch.empty(len(keys), most, device=keys.device, dtype=torch.int32)
    count = torch.empty(len(keys), device=keys.device, dtype=torch.int32)
    far = ratio or 1 << 40  # without entries: none is ever complete
    kernel_attention.list_keys[(len(keys), triton.cdiv(most, LIST))](
        positions, numbers, number, rows, count, FRONT, window, far, keys.shape[1], most, numbers.shape[-1], CHOSEN=chosen is not None,
        BLOCK=LIST, num_warps=2,
    )  # fmt: skip
    return rows, count


def choose(logits: Tensor, draws: Tensor, temperature: Tensor, tokens: Tensor, logprobs: Tensor) -> None:
    """Compute `op.choose`."""
    words = logits.shape[1]
    block = min(WORDS["BLOCK"], triton.next_power_of_2(words))
    tile = WORDS | {"BLOCK": block, "num_warps": min(WORDS["num_warps"], _warps(block))}
    kernel_tokens.choose[(len(logits),)](logits, draws, temperature, tokens, logprobs, words, **tile)


def _warps(block: int) -> int:
    return max(1, min(8, block // 256))
