"""The lightning indexer: scores compressed entries (V4's CSA layers) or tokens (V3.2) cheaply and keeps the best for each query."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.cache import LayerCache, PrefillPlan, Step
from model.compressor import Compressor
from model.config import AnyConfig, ModelConfig
from model.cpu import small_products
from model.kernels.indexer.loss import IndexScores, indexer_loss
from model.kernels.indexer.op import select
from model.kernels.indexer.reference import top_entries
from model.kernels.sparse_attention.blocked import Inputs
from model.layout import PackedRow
from model.linear import linear, wide_product
from model.norm import LayerNorm
from model.quant.qat import fake_quantize_index
from model.rope import rotate, rotate_halves

RATIO = 4
"""Compress ratio of the V4 layers that have an indexer."""


class Indexer(nn.Module):
    """Select the `index_topk` entries of the highest index score.

    I_ts = sum_h w_th ReLU(q_th . k_s), w = x W_w / sqrt(K H), k the indexer's own compressed entries. The choice is hard, so a
    language-model loss has no gradient here: the parameters are frozen until a loss of their own trains them.

    Attributes:
        ratio: tokens an entry.
        fp4: whether queries and keys are rotated and rounded to MXFP4, see `Transformer.quantize`.
        wq_b: query latent -> H * K.
        weights_proj: D -> H.
        compressor: the indexer's own, of width K.

    Source: v4_spec 2.3. The release's orthogonal Hadamard rotation of both sides cancels and is left out unless `fp4`.
    """

    ratio = RATIO

    def __init__(self, config: AnyConfig) -> None:
        super().__init__()
        self.heads, self.width, self.count = config.index_n_heads, config.index_head_dim, config.index_topk
        self.wq_b = linear(config.q_lora_rank, self.heads * self.width)
        self.weights_proj = linear(config.hidden_size, self.heads)
        self.fp4 = False
        self._make_keys(config)
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
        all_fit = row.entries[self.ratio].most <= self.count
        if all_fit and cache is None:
            return None
        keys = self._rounded(self._keys(x, row, cache, plan))
        if cache is not None and plan is not None:
            plan.put_entries(cache.index_keys, keys, self.ratio)
        if all_fit:
            return None
        q, weights = self._query(x, latent, row.turns[True])
        return select(row.spread(q), keys, row.spread(weights), row=row, ratio=self.ratio, count=self.count)

    def learn(self, x: Tensor, latent: Tensor, attention: Inputs) -> None:
        """Leave the loss of this layer's scores against what its attention does in `row.indexer_losses`.

        The inputs are constants here: the loss trains the indexer alone.

        Args:
            x: [U, D] and latent: [U, R] as in `forward`.
            attention: what the layer's sparse attention is given.
        """
        x, latent, row = x.detach(), latent.detach(), attention.row
        q, weights = self._query(x, latent, row.turns[True])
        scores = IndexScores(row.spread(q), self._rounded(self._keys(x, row, None, None)), row.spread(weights))
        row.indexer_losses.append(indexer_loss(scores, attention))

    def decode(self, x: Tensor, latent: Tensor, step: Step, cache: LayerCache) -> Tensor | None:
        """Take one token a row [B, D]; returns the bias [B, 1, keys] of the selection, None when all entries are visible."""
        assert cache.index_keys is not None
        done = self._new_keys(x, step, cache)
        if done is not None:
            rows, entries = done
            cache.index_keys[rows, step.position[rows] // self.ratio] = self._rounded(entries).to(cache.index_keys.dtype)
        if step.most[self.ratio] <= self.count:
            return None
        q, weights = self._query(x, latent, step.turns[True])
        with small_products():
            heads = torch.bmm(q.float(), cache.index_keys[:, : step.most[self.ratio]].float().mT).relu_()
            scores = torch.bmm(weights.unsqueeze(1), heads).squeeze(1)
        return step.selected_bias(self.ratio, top_entries(step.hide(scores, self.ratio), self.count))

    def _query(self, x: Tensor, latent: Tensor, turns: Tensor) -> tuple[Tensor, Tensor]:
        q = self._rotate(self.wq_b(latent).view(len(x), self.heads, self.width), turns.unsqueeze(1))
        weights = wide_product(x, self.weights_proj.weight)  # the release keeps the head weights in fp32
        return self._rounded(q), weights * (self.width * self.heads) ** -0.5

    def _rounded(self, x: Tensor) -> Tensor:
        return fake_quantize_index(x) if self.fp4 else x

    def _make_keys(self, config: AnyConfig) -> None:
        """Make the modules that keys come from."""
        assert isinstance(config, ModelConfig)
        self.compressor = Compressor(config, self.ratio, self.width)

    def _keys(self, x: Tensor, row: PackedRow, cache: LayerCache | None, plan: PrefillPlan | None) -> Tensor:
        """Return the keys of a packed row [C, K]; in a prefill, leave each sample's unfinished entry in the cache."""
        return self.compressor(x, row, *((cache.indexer, plan) if cache is not None else ()))

    def _new_keys(self, x: Tensor, step: Step, cache: LayerCache) -> tuple[Tensor, Tensor] | None:
        """Return the rows [n] that completed an entry with this token, and its keys [n, K]; None when there is none."""
        assert cache.indexer is not None
        return self.compressor.decode(x, step, cache.indexer)

    def _rotate(self, x: Tensor, turns: Tensor) -> Tensor:
        return rotate(x, turns)


class TokenIndexer(Indexer):
    """The indexer of V3.2: every token is an entry, k = rope(LayerNorm(x W_k)), the rotation in halves on the first dimensions.

    Attributes:
        wk: D -> K; k_norm: its layer norm, with bias.

    Source: v4_spec 2.8.
    """

    ratio = 1

    def _make_keys(self, config: AnyConfig) -> None:
        self.wk = linear(config.hidden_size, self.width)
        self.k_norm = LayerNorm(self.width, eps=1e-6)

    def _keys(self, x: Tensor, row: PackedRow, cache: LayerCache | None, plan: PrefillPlan | None) -> Tensor:
        return row.spread(self._rotate(self.k_norm(self.wk(x)), row.turns[True]))

    def _new_keys(self, x: Tensor, step: Step, cache: LayerCache) -> tuple[Tensor, Tensor] | None:
        return step.rows, self._rotate(self.k_norm(self.wk(x)), step.turns[True])

    def _rotate(self, x: Tensor, turns: Tensor) -> Tensor:
        return rotate_halves(x, turns)
