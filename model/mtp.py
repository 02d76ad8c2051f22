"""Multi-token prediction: one more block that predicts the token after the next."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.block import Block
from model.cache import LayerCache, PrefillPlan, Step, Steps
from model.config import ModelConfig
from model.hyper_connections import merge
from model.layout import PackedRow
from model.linear import linear
from model.norm import RMSNorm


class MTP(Block):
    """A sliding-window block over the final streams joined with the embedding of the next token.

    X' = e_proj(enorm(embed(next token))) + h_proj(hnorm(X)) on every stream; then the block, its own merge and its own norm. Embedding and
    head are the main model's.

    Source: v4_spec 5; DeepSeek-V3 report 2.2.
    """

    def __init__(self, config: ModelConfig, depth: int) -> None:
        super().__init__(config, config.num_hidden_layers + depth)
        width = config.hidden_size
        self.e_proj, self.h_proj = linear(width, width), linear(width, width)
        self.enorm, self.hnorm = RMSNorm(width, config.rms_norm_eps), RMSNorm(width, config.rms_norm_eps)
        self.norm = RMSNorm(width, config.rms_norm_eps)
        self.hc_head_fn = nn.Parameter(torch.empty(config.hc_mult, config.hc_mult * width))
        self.hc_head_base = nn.Parameter(torch.zeros(config.hc_mult))
        self.hc_head_scale = nn.Parameter(torch.empty(1))

    def forward(  # type: ignore[override]
        self,
        streams: Tensor,
        following: Tensor,
        next_tokens: Tensor,
        row: PackedRow,
        cache: LayerCache | None = None,
        plan: PrefillPlan | None = None,
    ) -> Tensor:
        """Return the hidden states [T, D] that the shared head turns into logits of the token after the next.

        Args:
            streams: [T, M, D] of the main model's last block.
            following: [T, D] embedding of each token's successor.
            next_tokens: [T] int64, the successors themselves.
            row: layout; the last token of each sample has no successor of its own, its result is meaningless.
            cache, plan: where a prefill leaves the keys; both or neither.
        """
        streams, _ = super().forward(self._joined(streams, following), next_tokens, row, cache, plan)
        return self._last(streams)

    def draft(self, streams: Tensor, following: Tensor, next_tokens: Tensor, step: Step | Steps, cache: LayerCache) -> Tensor:
        """Do the same for one new token a row, or for n with `Steps`: streams [n * B, M, D] to hidden states [n * B, D]."""
        return self._last(self.decode(self._joined(streams, following), next_tokens, step, cache))

    def _joined(self, streams: Tensor, following: Tensor) -> Tensor:
        return self.e_proj(self.enorm(following)).unsqueeze(1) + self.h_proj(self.hnorm(streams))

    def _last(self, streams: Tensor) -> Tensor:
        return self.norm(merge(streams, self.hc_head_fn, self.hc_head_base, self.hc_head_scale, config=self.config))
