"""The buffers of a decoding step, allocated once for all rows of a cache."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from model.config import ModelConfig
from model.kernels.decode.attention import Buffers
from model.kernels.decode.experts import ExpertBuffers
from model.kernels.decode.products import LANES, padded
from model.kernels.decode.streams import Streams


def streams_room(config: ModelConfig, rows: int) -> Streams:
    """Allocate what the hyper-connections need."""
    copies, width = config.hc_mult, config.hidden_size
    mixes = copies * (copies + 2)
    return Streams(
        now=_room(rows, copies, width),
        then=_room(rows, copies, width),
        mix=_room(rows, padded(mixes)),
        lanes=_room(mixes + copies, LANES),
        x=_room(rows, width),
        post=_room(rows, copies),
        comb=_room(rows, copies, copies),
    )


def attention_room(config: ModelConfig, rows: int, *, capacity: int, wide: int) -> Buffers:
    """Allocate what the attention needs; `wide` outputs of the widest layer's input projections, `capacity` tokens a row."""
    heads = config.num_attention_heads * config.head_dim
    entries = capacity // min((r for r in config.compress_ratios if r), default=capacity + 1)
    return Buffers(
        wide=_room(rows, padded(wide)),
        latent=_room(rows, config.q_lora_rank),
        q=_room(rows, padded(heads)),
        index_q=_room(rows, padded(config.index_n_heads * config.index_head_dim)),
        flat=_room(max(config.head_dim, config.index_head_dim), LANES),
        scores=_room(config.sliding_window + entries, LANES),
        highest=_room(LANES),
        totals=_room(LANES),
        weights=_room(LANES, padded(config.sliding_window + entries)),
        pool=_room(2, max(config.head_dim, config.index_head_dim)),
        o=_room(rows, heads),
        low=_room(rows, config.o_groups * config.o_lora_rank + LANES),
        out=_room(rows, padded(config.hidden_size)),
        picked=_room(min(config.index_topk, entries), config.head_dim),
        found=_room(entries),
        order=np.zeros(entries, np.int64),
    )


def expert_room(config: ModelConfig, rows: int) -> ExpertBuffers:
    """Allocate what the experts need."""
    active, inner = config.num_experts_per_tok, config.moe_intermediate_size
    pairs = rows * (active + 1)
    return ExpertBuffers(
        scores=_room(rows, padded(config.n_routed_experts)),
        chosen=np.zeros((rows, active), np.int64),
        shares=_room(rows, active),
        place=np.zeros((rows, active), np.int64),
        ends=np.zeros(config.n_routed_experts + 2, np.int64),
        x=_room(pairs, config.hidden_size),
        hidden=_room(pairs, padded(2 * inner)),
        inner=_room(pairs, inner),
        y=_room(pairs, padded(config.hidden_size)),
    )


def _room(*shape: int) -> NDArray[np.float32]:
    return np.zeros(shape, np.float32)
