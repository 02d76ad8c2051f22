"""Attention of one layer: sliding window alone, with selected compressed entries (CSA), or with heavily compressed ones (HCA)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.cache import FRONT, LayerCache, PrefillPlan, Step, Steps
from model.compressor import Compressor
from model.config import ModelConfig
from model.cpu import small_products
from model.indexer import RATIO, Indexer
from model.kernels.sparse_attention.blocked import Inputs
from model.kernels.sparse_attention.op import sparse_attention
from model.layout import PackedRow
from model.linear import GroupedLinear, joint_linear, linear
from model.norm import RMSNorm, unit_norm
from model.quant.qat import fake_quantize_kv
from model.rope import rotate


class Attention(nn.Module):
    """Attend with H query heads to one key-value head, with a sink, rotating the output back by the query's position.

    Attributes:
        compressor: of layers with a compress ratio, indexer: of CSA layers; else None.
        attn_sink: [H] logit of the sink.
        fp8_keys: whether window keys and compressed entries are rounded as the FP8 cache keeps them, see `Transformer.quantize`.

    Source: v4_spec 2.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.ratio = config.compress_ratios[layer]
        self.heads, self.width, self.eps = config.num_attention_heads, config.head_dim, config.rms_norm_eps
        self.rope = config.qk_rope_head_dim
        self.wq_a = linear(config.hidden_size, config.q_lora_rank)
        self.q_norm = RMSNorm(config.q_lora_rank, self.eps)
        self.wq_b = linear(config.q_lora_rank, self.heads * self.width)
        self.wkv = linear(config.hidden_size, self.width)
        self.kv_norm = RMSNorm(self.width, self.eps)
        self.wo_a = GroupedLinear(self.heads * self.width // config.o_groups, config.o_lora_rank, config.o_groups)
        self.wo_b = linear(config.o_groups * config.o_lora_rank, config.hidden_size)
        self.attn_sink = nn.Parameter(torch.zeros(self.heads))
        self.fp8_keys = False
        self.compressor = Compressor(config, self.ratio, self.width) if self.ratio else None
        self.indexer = Indexer(config) if self.ratio == RATIO else None

    def forward(self, x: Tensor, row: PackedRow, cache: LayerCache | None = None, plan: PrefillPlan | None = None) -> Tensor:
        """Attend within the samples of a packed row.

        Args:
            x: [U, D] normalised input.
            row: layout.
            cache, plan: where a prefill leaves the keys; both or neither.

        Returns:
            [U, D].
        """
        turns = row.turns[bool(self.ratio)]
        maps = () if self.compressor is None else (self.compressor.wkv, self.compressor.wgate)
        latent, key, *pooled = joint_linear(x, self.wq_a, self.wkv, *maps)
        latent, q, kv = self._rotated(latent, key, turns)
        if cache is not None and plan is not None:
            plan.put_window(cache.keys, kv)
        entries = indices = None
        if self.compressor is not None:
            entries = self._rounded(self.compressor.pool(tuple(pooled), row, *((cache.compressor, plan) if cache is not None else ())))
            if cache is not None and plan is not None:
                plan.put_entries(cache.keys, entries, self.ratio, offset=FRONT + row.window)
        if self.indexer is not None and row.indexer != "dense":
            indices = self.indexer(x, latent, row, cache, plan)
        q, kv = row.spread(q), row.spread(kv)
        if self.indexer is not None and row.indexer:
            self.indexer.learn(x, latent, Inputs(q, kv, entries, self.attn_sink, indices, row, self.ratio))
        out = sparse_attention(q, kv, entries, indices, self.attn_sink, row=row, ratio=self.ratio)
        return self._output(row.gather(out), turns)

    def decode(self, x: Tensor, step: Step | Steps, cache: LayerCache) -> Tensor:
        """Attend from one new token a row, [B, D] to [B, D], and put it in the cache; with `Steps` from n tokens a row, [n * B, D]."""
        turns = step.turns[bool(self.ratio)]
        new = (x, *self._project(x, turns))
        if isinstance(step, Step):
            return self._output(self._attend(new, step, cache), turns)
        parts = zip(*(each.chunk(len(step.parts)) for each in new), strict=True)
        return self._output(torch.cat([self._attend(part, one, cache) for part, one in zip(parts, step.parts, strict=True)]), turns)

    def _attend(self, new: tuple[Tensor, ...], step: Step, cache: LayerCache) -> Tensor:
        """Put one token a row, its input and projections, in the cache and return what its heads gather, [B, H, K]."""
        x, latent, q, kv = new
        cache.keys[step.rows, step.slot] = kv.to(cache.keys.dtype)
        bias = step.biases[self.ratio]
        if self.compressor is not None and cache.compressor is not None:
            done = self.compressor.decode(x, step, cache.compressor)
            if done is not None:
                rows, entries = done
                cache.keys[rows, FRONT + step.window + step.position[rows] // self.ratio] = self._rounded(entries).to(cache.keys.dtype)
        if self.indexer is not None:
            selected = self.indexer.decode(x, latent, step, cache)
            bias = bias if selected is None else selected
        keys = cache.keys[:, : step.keys(self.ratio)].float()
        with small_products():
            scores = torch.bmm(q.float() * self.width**-0.5, keys.mT).add_(bias)
            scores[:, :, 0] = self.attn_sink
            out = torch.bmm(scores.softmax(-1), keys)
        return out.to(x.dtype)

    def _project(self, x: Tensor, turns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the query latent [T, R], the queries [T, H, K] and the window key [T, K], rotated."""
        return self._rotated(self.wq_a(x), self.wkv(x), turns)

    def _rotated(self, latent: Tensor, key: Tensor, turns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        latent = self.q_norm(latent)
        q = unit_norm(self.wq_b(latent).view(len(latent), self.heads, self.width), self.eps, turns.unsqueeze(1))
        return latent, q, self._rounded(self.kv_norm(key, turns))

    def _rounded(self, keys: Tensor) -> Tensor:
        return fake_quantize_kv(keys, rope_dims=self.rope) if self.fp8_keys else keys

    def _output(self, out: Tensor, turns: Tensor) -> Tensor:
        """Rotate [T, H, K] back and project it to [T, D]."""
        return self.wo_b(self.wo_a(rotate(out, turns.unsqueeze(1), inverse=True).flatten(1)))
