"""The lightning indexer of CSA layers: scores compressed entries cheaply and keeps the best for each query."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.cache import LayerCache, PrefillPlan, Step
from model.compressor import Compressor
from model.config import ModelConfig
from model.cpu import small_products
from model.kernels.indexer.reference import select, top_entries
from model.layout import PackedRow
from model.linear import linear
from model.rope import rotate

RATIO = 4
"""Compress ratio of the layers that have an indexer."""


class Indexer(nn.Module):
    """Select the `index_topk` entries of the highest index score.

    I_ts = sum_h w_th ReLU(q_th . k_s), w = x W_w / sqrt(K H), k the indexer's own compressed entries. The choice is hard, so a
    language-model loss has no gradient here: the parameters are frozen until a loss of their own trains them.

    Attributes:
        wq_b: query latent -> H * K.
        weights_proj: D -> H.
        compressor: the indexer's own, of width K.

    Source: v4_spec 2.3. The release's orthogonal Hadamard rotation of both sides cancels and is left out.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.width, self.count = config.index_n_heads, config.index_head_dim, config.index_topk
        self.wq_b = linear(config.q_lora_rank, self.heads * self.width)
        self.weights_proj = linear(config.hidden_size, self.heads)
        self.compressor = Compressor(config, RATIO, self.width)
        self.requires_grad_(False)

    @torch.no_grad()
    def forward(
        self, x: Tensor, latent: Tensor, row: PackedRow, cache: LayerCache | None = None, plan: PrefillPlan | None = None
    ) -> Tensor | None:
        """Select entries for every token of a packed row.

        Args:
            x: [U, D] the sub-layer's input.
            latent: [U, R] the normalised query latent shared with the attention.
            row: layout.
            cache, plan: where a prefill leaves the index keys.

        Returns:
            [T, k] int64 as `sparse_attention` takes them; None when every query may see all its entries.
        """
        all_fit = row.entries[RATIO].most <= self.count
        if all_fit and cache is None:
            return None
        keys = self.compressor(x, row, *((cache.indexer, plan) if cache is not None else ()))
        if cache is not None and plan is not None:
            plan.put_entries(cache.index_keys, keys, RATIO)
        if all_fit:
            return None
        q, weights = self._query(x, latent, row.turns[True])
        return select(row.spread(q), keys, row.spread(weights), row=row, ratio=RATIO, count=self.count)

    def decode(self, x: Tensor, latent: Tensor, step: Step, cache: LayerCache) -> Tensor | None:
        """Take one token a row [B, D]; returns the bias [B, 1, keys] of the selection, None when all entries are visible."""
        assert cache.index_keys is not None and cache.indexer is not None
        done = self.compressor.decode(x, step, cache.indexer)
        if done is not None:
            rows, entries = done
            cache.index_keys[rows, step.position[rows] // RATIO] = entries.to(cache.index_keys.dtype)
        if step.most[RATIO] <= self.count:
            return None
        q, weights = self._query(x, latent, step.turns[True])
        with small_products():
            heads = torch.bmm(q.float(), cache.index_keys[:, : step.most[RATIO]].float().mT).relu_()
            scores = torch.bmm(weights.float().unsqueeze(1), heads).squeeze(1)
        return step.selected_bias(RATIO, top_entries(step.hide(scores, RATIO), self.count))

    def _query(self, x: Tensor, latent: Tensor, turns: Tensor) -> tuple[Tensor, Tensor]:
        q = rotate(self.wq_b(latent).view(len(x), self.heads, self.width), turns.unsqueeze(1))
        return q, self.weights_proj(x) * (self.width * self.heads) ** -0.5
