"""One layer: attention and mixture of experts, each between its own hyper-connections."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.attention import Attention
from model.cache import LayerCache, PrefillPlan, Step, Steps
from model.config import ModelConfig
from model.hyper_connections import mix_in, mix_out
from model.layout import PackedRow
from model.moe import MoE
from model.norm import RMSNorm


class Block(nn.Module):
    """Update the residual streams [T, M, D] by attention, then by the experts.

    Attributes:
        hc_attn_fn, hc_attn_base, hc_attn_scale, hc_ffn_*: hyper-connection parameters in fp32, see `mix_in`.

    Source: v4_spec 3.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config = config
        self.attn = Attention(config, layer)
        self.ffn = MoE(config, layer)
        self.attn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.ffn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        mixes, wide = (2 + config.hc_mult) * config.hc_mult, config.hc_mult * config.hidden_size
        self.hc_attn_fn = nn.Parameter(torch.empty(mixes, wide))
        self.hc_attn_base = nn.Parameter(torch.zeros(mixes))
        self.hc_attn_scale = nn.Parameter(torch.empty(3))
        self.hc_ffn_fn = nn.Parameter(torch.empty(mixes, wide))
        self.hc_ffn_base = nn.Parameter(torch.zeros(mixes))
        self.hc_ffn_scale = nn.Parameter(torch.empty(3))

    def forward(
        self, streams: Tensor, tokens: Tensor, row: PackedRow, cache: LayerCache | None = None, plan: PrefillPlan | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Pass a packed row.

        Args:
            streams: [U, M, D].
            tokens: [U] int64, for hash routing.
            row: layout.
            cache, plan: where a prefill leaves the keys; both or neither.

        Returns:
            streams [U, M, D] and the balance loss [], None in a prefill and where samples share tokens: it counts per sample.
        """
        x, post, comb, streams = self._attn_in(streams)
        streams = mix_out(self.attn(x, row, cache, plan), streams, post, comb)
        x, post, comb, streams = self._ffn_in(streams)
        out, balance = self.ffn(x, tokens, row if row.source is None and cache is None else None)
        return mix_out(out, streams, post, comb), balance

    def decode(self, streams: Tensor, tokens: Tensor, step: Step | Steps, cache: LayerCache) -> Tensor:
        """Pass one new token a row: streams [B, M, D], tokens [B]; n tokens a row with `Steps`, the first of all rows before the second."""
        x, post, comb, streams = self._attn_in(streams)
        streams = mix_out(self.attn.decode(x, step, cache), streams, post, comb)
        x, post, comb, streams = self._ffn_in(streams)
        return mix_out(self.ffn(x, tokens, None)[0], streams, post, comb)

    def _attn_in(self, streams: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x, post, comb, streams = mix_in(streams, self.hc_attn_fn, self.hc_attn_base, self.hc_attn_scale, config=self.config)
        return self.attn_norm(x), post, comb, streams

    def _ffn_in(self, streams: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x, post, comb, streams = mix_in(streams, self.hc_ffn_fn, self.hc_ffn_base, self.hc_ffn_scale, config=self.config)
        return self.ffn_norm(x), post, comb, streams
