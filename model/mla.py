"""Multi-head latent attention of V3.2 over the tokens that its indexer selects: every token keeps one latent that all heads share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.cache import FRONT, LayerCache, PrefillPlan, Step
from model.config import V32Config
from model.cpu import small_products
from model.indexer import TokenIndexer
from model.kernels.sparse_attention.blocked import Inputs
from model.kernels.sparse_attention.op import sparse_attention
from model.layout import PackedRow
from model.linear import linear
from model.norm import RMSNorm
from model.rope import rotate

RATIO = TokenIndexer.ratio
"""Tokens an entry that attention meets; every token is one."""

NO_SINK = -1e30
"""Logit of a sink that draws nothing; finite, so that a padded query, which sees no key at all, has a softmax."""


class MLA(nn.Module):
    """Attend with H query heads to the latents of the selected tokens.

    [c | k_r] = x W_kv_a; a head's key is [W_k c | rope(k_r)] and its value W_v c, (W_k | W_v) = `wkv_b`. Heads are never expanded: queries
    go through W_k and outputs through W_v instead, so that one vector a token, [c | rope(k_r)], serves all heads as key and value. The
    release's is 576 wide, no power of two: packed rows are attended to in plain torch on a GPU too, see `sparse_attention`.

    Attributes:
        wq_a, wq_b: the query's way through its latent, whose norm `q_norm` the indexer shares.
        wkv_a: D -> R + rotated dimensions; kv_norm: of the latent.
        wkv_b: R -> H * (unrotated key dimensions + value dimensions).
        wo: H * value dimensions -> D.

    Source: v4_spec 2.8; V3.2 report section 2.1, MQA mode.
    """

    def __init__(self, config: V32Config) -> None:
        super().__init__()
        self.heads, self.rank = config.num_attention_heads, config.kv_lora_rank
        self.nope, self.rope, self.value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        self.scale = config.softmax_scale
        self.wq_a = linear(config.hidden_size, config.q_lora_rank)
        self.q_norm = RMSNorm(config.q_lora_rank, config.rms_norm_eps)
        self.wq_b = linear(config.q_lora_rank, self.heads * (self.nope + self.rope))
        self.wkv_a = linear(config.hidden_size, config.key_width)
        self.kv_norm = RMSNorm(self.rank, config.rms_norm_eps)
        self.wkv_b = linear(self.rank, self.heads * (self.nope + self.value))
        self.wo = linear(self.heads * self.value, config.hidden_size)
        self.indexer = TokenIndexer(config)

    def forward(self, x: Tensor, row: PackedRow, cache: LayerCache | None = None, plan: PrefillPlan | None = None) -> Tensor:
        """Attend within the samples of a packed row.

        Args:
            x: [U, D] normalised input.
            row: layout.
            cache, plan: where a prefill leaves the keys; both or neither.

        Returns:
            [U, D].
        """
        latent, q, key = self._project(x, row.turns[True])
        q, key = row.spread(q), row.spread(key)
        if cache is not None and plan is not None:
            plan.put_entries(cache.keys, key, RATIO, offset=FRONT + row.window)
        indices = None if row.indexer == "dense" else self.indexer(x, latent, row, cache, plan)
        sink = key.new_full((self.heads,), NO_SINK)
        own = key.new_zeros(len(key), key.shape[1])  # the window is empty: a query meets tokens, itself among them, as entries only
        q = q * q.shape[2] ** 0.5  # by which sparse attention divides
        if row.indexer:
            self.indexer.learn(x, latent, Inputs(q, own, key, sink, indices, row, RATIO))
        out = sparse_attention(q, own, key, indices, sink, row=row, ratio=RATIO)
        return self._output(row.gather(out))

    def decode(self, x: Tensor, step: Step, cache: LayerCache) -> Tensor:
        """Attend from one new token a row, [B, D] to [B, D], and put it in the cache."""
        latent, q, key = self._project(x, step.turns[True])
        cache.keys[step.rows, FRONT + step.window + step.position] = key.to(cache.keys.dtype)
        selected = self.indexer.decode(x, latent, step, cache)
        bias = step.biases[RATIO] if selected is None else selected
        keys = cache.keys[:, FRONT + step.window : step.keys(RATIO)].float()
        with small_products():
            scores = torch.bmm(q.float(), keys.mT).add_(bias[:, :, FRONT + step.window :])
            out = torch.bmm(scores.softmax(-1), keys)
        return self._output(out.to(x.dtype))

    def _project(self, x: Tensor, turns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the query latent [T, R'], the scaled queries [T, H, K] and the key [T, K], K = `key_width`, rotated."""
        latent = self.q_norm(self.wq_a(x))
        q = rotate(self.wq_b(latent).view(len(x), self.heads, -1) * self.scale, turns.unsqueeze(1))
        to_latent = self.wkv_b.weight.view(self.heads, -1, self.rank)[:, : self.nope]  # [H, nope, R]
        absorbed = torch.bmm(q[..., : self.nope].transpose(0, 1), to_latent).transpose(0, 1)
        content, position = self.wkv_a(x).split([self.rank, self.rope], -1)
        key = rotate(torch.cat([self.kv_norm(content), position], -1), turns)
        return latent, torch.cat([absorbed, q[..., self.nope :]], -1), key

    def _output(self, out: Tensor) -> Tensor:
        """Turn each head's mean latent [T, H, K] into its value and project to [T, D]; the rotated dimensions are no value."""
        to_value = self.wkv_b.weight.view(self.heads, -1, self.rank)[:, self.nope :]  # [H, value, R]
        values = torch.bmm(out[..., : self.rank].transpose(0, 1), to_value.mT).transpose(0, 1)
        return self.wo(values.flatten(1))
