"""One layer of V3.2: latent attention and a feed-forward network, each added to the plain residual stream."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.cache import LayerCache, PrefillPlan, Step
from model.config import V32Config
from model.layout import PackedRow
from model.mla import MLA
from model.moe import MLP, MoE
from model.norm import RMSNorm


class V32Block(nn.Module):
    """Update the residual stream by attention, then by the experts, or by the dense network of the first layers.

    x = x + attn(norm(x)); x = x + ffn(norm(x)). The one stream is kept as [T, 1, D], so that both architectures have the same face.

    Source: v4_spec 2.8.
    """

    def __init__(self, config: V32Config, layer: int) -> None:
        super().__init__()
        self.attn = MLA(config)
        dense = layer < config.first_k_dense_replace
        self.ffn = MLP(config.hidden_size, config.intermediate_size, config.swiglu_limit) if dense else MoE(config, layer)
        self.attn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.ffn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, streams: Tensor, tokens: Tensor, row: PackedRow, cache: LayerCache | None = None, plan: PrefillPlan | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Pass a packed row.

        Args:
            streams: [U, 1, D].
            tokens: [U] int64.
            row: layout.
            cache, plan: where a prefill leaves the keys; both or neither.

        Returns:
            streams [U, 1, D] and the balance loss [], None in a prefill and where samples share tokens: it counts per sample.
        """
        x = streams.squeeze(1)
        x = x + self.attn(self.attn_norm(x), row, cache, plan)
        out, balance = self._feed_forward(self.ffn_norm(x), tokens, row if row.source is None and cache is None else None)
        return (x + out).unsqueeze(1), balance

    def decode(self, streams: Tensor, tokens: Tensor, step: Step, cache: LayerCache) -> Tensor:
        """Pass one new token a row: streams [B, 1, D], tokens [B]."""
        x = streams.squeeze(1)
        x = x + self.attn.decode(self.attn_norm(x), step, cache)
        return (x + self._feed_forward(self.ffn_norm(x), tokens, None)[0]).unsqueeze(1)

    def _feed_forward(self, x: Tensor, tokens: Tensor, row: PackedRow | None) -> tuple[Tensor, Tensor | None]:
        if isinstance(self.ffn, MoE):
            return self.ffn(x, tokens, row)
        return self.ffn(x), None if row is None else x.new_zeros((), dtype=torch.float32)
