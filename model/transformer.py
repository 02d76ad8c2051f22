"""The whole model: packed training rows, prefill, batched decoding, and the router's bias rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.attention import Attention
from model.block import Block
from model.cache import Cache, PrefillPlan, Step, Steps
from model.config import AnyConfig, ModelConfig, V32Config
from model.hyper_connections import copies, merge
from model.indexer import Indexer
from model.layout import PackedRow
from model.linear import wide_product
from model.moe import Experts, Gate, MoE
from model.mtp import MTP
from model.norm import RMSNorm
from model.v32 import V32Block

HC_SCALE = 0.01
"""Initial gating factor of the hyper-connections. Source: mHC paper, table 5."""


class Hidden(NamedTuple):
    """What a forward pass leaves.

    Attributes:
        last: [T, D] after the final merge and norm, what the head reads.
        streams: [U, M, D] residual streams after the last block, what MTP reads.
        balance_loss: [] fp32, sequence-wise, summed over the scored layers, without its weight; None where samples share tokens.
        indexer_loss: [] fp32 nats, averaged over the layers with an indexer; None unless it was asked for.
    """

    last: Tensor
    streams: Tensor
    balance_loss: Tensor | None
    indexer_loss: Tensor | None = None


class Head(nn.Module):
    """The output projection; `weight` [V, D]."""

    def __init__(self, config: AnyConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))

    def forward(self, hidden: Tensor, op: Callable[[Tensor, Tensor], Tensor] | None = None) -> Tensor:
        """Return fp32 logits [T, V] of `hidden` [T, D], or `op(hidden, weight)`: a chunked loss, the weight gathered around it."""
        if op is not None:
            return op(hidden, self.weight)
        return wide_product(hidden, self.weight)


class Transformer(nn.Module):
    """A DeepSeek-V4 or V3.2 model with the parameter names of the released code, except that routed experts are stacked.

    V3.2 has one residual stream without hyper-connections, and no MTP block here.

    Raises:
        ValueError: the configuration contradicts itself; all problems at once.
    """

    def __init__(self, config: AnyConfig) -> None:
        if found := config.problems():
            raise ValueError("model config: " + "; ".join(found))
        super().__init__()
        self.config = config
        self.quantization = {"experts": False, "indexer": False, "kv": False}
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(_block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = Head(config)
        self.mtp = nn.ModuleList()
        if isinstance(config, ModelConfig):
            self.hc_head_fn = nn.Parameter(torch.empty(config.hc_mult, config.hc_mult * config.hidden_size))
            self.hc_head_base = nn.Parameter(torch.zeros(config.hc_mult))
            self.hc_head_scale = nn.Parameter(torch.empty(1))
            self.mtp.extend(MTP(config, depth) for depth in range(config.num_nextn_predict_layers))
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        """Draw matrices from normal(0, initializer_range); norms are 1, biases, sinks and `ape` 0, gating factors `HC_SCALE`."""
        for name, parameter in self.named_parameters():
            if name.endswith("_scale"):
                parameter.fill_(HC_SCALE)
            elif parameter.ndim >= 2 and not name.endswith("ape"):
                parameter.normal_(0, self.config.initializer_range)

    def forward(self, tokens: Tensor, cu_seqlens: Tensor, source: Tensor | None = None, *, indexer: str = "") -> Hidden:
        """Pass one packed row; no sample sees another.

        Args:
            tokens: [T] int64.
            cu_seqlens: [N + 1] int32 or int64, from 0 to T; on the host or beside the tokens, as `source`. From the host nothing waits.
            source: [T] int64, which of U computed tokens each token is; samples that begin with the same tokens may share those, at the
                same positions. None computes every token.
            indexer: "" selects, "dense" and "sparse" let the indexers learn, see `PackedRow.indexer`.
        """
        row = PackedRow(self.config, cu_seqlens, len(tokens), source, indexer=indexer, device=tokens.device)
        streams, balance = self.streams(row.gather(tokens), row)
        learnt = torch.stack(row.indexer_losses).mean() if row.indexer_losses else None
        return Hidden(row.spread(self.last(streams)), streams, balance, learnt)

    @torch.no_grad()
    def prefill(self, tokens: Tensor, cu_seqlens: Tensor, cache: Cache) -> Tensor:
        """Fill row i of an empty cache from sequence i of a packed row.

        Returns:
            [N, D] hidden state of each last token, what the head reads.

        Raises:
            ValueError: rows or lengths do not fit the cache.
        """
        row = PackedRow(self.config, cu_seqlens, len(tokens), device=tokens.device)
        streams, _ = self.streams(tokens, row, cache, PrefillPlan(row, cache, cu_seqlens))
        cache.positions.copy_(row.lengths)
        return self.last(streams.index_select(0, row.cu_seqlens[1:] - 1))

    @torch.no_grad()
    def decode(self, tokens: Tensor, cache: Cache) -> Tensor:
        """Advance every row of the cache by one token.

        Args:
            tokens: [B] int64.
            cache: rows may be at different positions.

        Returns:
            [B, D] hidden states, what the head reads.

        Raises:
            ValueError: a row is full, or there is not one token a row.
        """
        if len(tokens) != cache.rows:
            raise ValueError(f"decode: got {len(tokens)} tokens, expected one for each of {cache.rows} cache rows")
        step = Step(self.config, cache.positions)
        if step.longest > cache.capacity:
            raise ValueError(f"decode: got a row of {step.longest} tokens, expected at most the capacity {cache.capacity}")
        streams = self.decode_streams(tokens, step, cache)
        cache.positions += 1
        return self.last(streams)

    def decode_streams(self, tokens: Tensor, step: Step | Steps, cache: Cache) -> Tensor:
        """Pass new tokens through all blocks, [B] to streams [B, M, D], or [n * B] with `Steps`; positions stay as they are."""
        streams = self._embed(tokens)
        for block, layer_cache in zip(self.layers, cache.layers):
            streams = block.decode(streams, tokens, step, layer_cache)  # type: ignore[operator]
        return streams

    def mtp_hidden(self, hidden: Hidden, tokens: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Return [T, D] hidden states of the MTP block: through the head they predict token t + 2.

        The last token of each sample has no successor; what stands there is meaningless and no other token sees it.

        Raises:
            ValueError: the model has no MTP block.
        """
        if not self.mtp:
            raise ValueError("mtp: this model has no MTP block, expected num_nextn_predict_layers = 1 of a V4")
        row = PackedRow(self.config, cu_seqlens, len(tokens), device=tokens.device)
        following = tokens.roll(-1)
        return self.mtp[0](hidden.streams, self.embed(following), following, row)

    def quantize(self, *, experts: bool = False, indexer: bool = False, kv: bool = False) -> None:
        """Compute with what low-precision inference will see; gradients go straight to the full-precision weights.

        Args:
            experts: routed experts on MXFP4's grid.
            indexer: index queries and keys Hadamard-transformed and rounded to MXFP4; `index_head_dim` is a power of two then.
            kv: window keys and compressed entries on the grid of the FP8 cache; V4 only.

        Raises:
            ValueError: the architecture has no such grid.

        Source: v4_spec 7; V4 report 5.2.1.
        """
        if indexer and self.config.index_head_dim & (self.config.index_head_dim - 1):
            raise ValueError(f"quantize indexer: got index_head_dim {self.config.index_head_dim}, expected a power of two")
        if kv and not isinstance(self.config, ModelConfig):
            raise ValueError("quantize kv: only V4's cache has this grid")
        self.quantization = {"experts": experts, "indexer": indexer, "kv": kv}
        for module in self.modules():
            if isinstance(module, Experts):
                module.fp4 = experts
            elif isinstance(module, Indexer):
                module.fp4 = indexer
            elif isinstance(module, Attention):
                module.fp8_keys = kv

    def router_load(self) -> Tensor:
        """Return the tokens each expert got in training since the last bias update: [L, E] fp32, layers with experts, then MTP blocks."""
        return torch.stack([gate.load for gate in self._gates()])

    @torch.no_grad()
    def update_router_bias(self, speed: float, load: Tensor | None = None) -> None:
        """Move the router biases of scored layers by the sign of their underload, then forget the loads.

        Args:
            speed: step of the bias.
            load: [L, E] loads summed over ranks; None takes this rank's own.
        """
        for gate, counts in zip(self._gates(), self.router_load() if load is None else load):
            gate.update_bias(speed, counts)
            gate.load.zero_()

    def _gates(self) -> list[Gate]:
        return [block.ffn.gate for block in (*self.layers, *self.mtp) if isinstance(block.ffn, MoE)]

    def _embed(self, tokens: Tensor) -> Tensor:
        """Repeat the embedding on every stream, [T, M, D]."""
        return copies(self.embed(tokens), self.config.hc_mult)

    def streams(
        self, tokens: Tensor, row: PackedRow, cache: Cache | None = None, plan: PrefillPlan | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Pass a packed row through all blocks: tokens [U] to streams [U, M, D] and the balance loss; a prefill fills `cache` instead."""
        streams = self._embed(tokens)
        balance = torch.zeros((), device=tokens.device) if row.source is None and cache is None else None
        for layer, block in enumerate(self.layers):
            streams, loss = block(streams, tokens, row, None if cache is None else cache.layers[layer], plan)
            balance = None if balance is None else balance + loss
        return streams, balance

    def last(self, streams: Tensor) -> Tensor:
        """Merge and normalise the streams [n, M, D] after the last block into what the head reads, [n, D]."""
        if isinstance(self.config, V32Config):
            return self.norm(streams.squeeze(1))
        return self.norm(merge(streams, self.hc_head_fn, self.hc_head_base, self.hc_head_scale, config=self.config))


def _block(config: AnyConfig, layer: int) -> Block | V32Block:
    return V32Block(config, layer) if isinstance(config, V32Config) else Block(config, layer)
