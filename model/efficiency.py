"""What one token costs in a V4 or V3.2 model, by arithmetic alone: FLOPs by precision, bytes of cache, parameters.

A product of an [n, k] matrix with a vector is n k multiply-adds, two FLOPs each; FLOPs are turned into FP8-equivalent ones by the
precision they run in (`PRECISIONS`). A token at context length T, itself included, is decoded with everything before it cached, V3.2 in
its absorbed form. Norms, rotations, softmaxes, gates, the pooling of a compressor and Sinkhorn's iterations are no products: not counted.

Source: DeepSeek-V4 report, section 2.3.4 and figure 1; v4_spec 10. That core attention runs in BF16 and the indexer's scores in FP4 follows
from the report's ratios; the other precisions are those of the released inference code, and the ratios hold with them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from model.config import AnyConfig, ModelConfig, V32Config

PRECISIONS = {"FP4xFP4": 0.5, "FP4xFP8": 1.0, "FP8": 1.0, "BF16": 2.0, "FP32": 4.0}
"""FP8-equivalent cost of one FLOP. FP4 weights times FP8 activations run at FP8 speed on today's hardware; FP32 products in TF32."""

GROUPS = ("dense", "experts", "core attention", "indexer", "compressor", "mHC", "head")
"""Dense: attention's projections and V3.2's first feed-forward layers. Experts: routed, shared, and their router."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One kind of product, summed over the layers.

    Attributes:
        name: parameters as the release names them, or what is multiplied.
        group: one of `GROUPS`.
        precision: one of `PRECISIONS`.
        macs: multiply-adds a token.
        params: parameters held, active: those that a token uses.
    """

    name: str
    group: str
    precision: str
    macs: int = 0
    params: int = 0
    active: int = 0

    @property
    def flops(self) -> int:
        """FLOPs a token, whatever their precision."""
        return 2 * self.macs

    @property
    def fp8_flops(self) -> float:
        """FP8-equivalent FLOPs a token."""
        return self.flops * PRECISIONS[self.precision]


@dataclass(frozen=True, kw_only=True)
class Cached:
    """One kind of cached vector, over all layers.

    Attributes:
        name: what it is.
        vectors: how many, width: numbers in each.
        bytes_each: in the released format, scales included.
    """

    name: str
    vectors: int
    width: int
    bytes_each: int


class Parameters(NamedTuple):
    """Parameters of a model without MTP.

    Attributes:
        total: all but those of the hyper-connections, as models of either architecture are compared.
        active: of these, what a token is multiplied with: the head, but neither the embedding nor the experts that were not chosen.
        hyper_connections: V4's maps between residual streams, under 0.1B in the released models.
    """

    total: int
    active: int
    hyper_connections: int


def parts(config: AnyConfig, length: int) -> list[Part]:
    """List what a token at a context length multiplies and what the model holds; MTP is left out.

    Args:
        config: a model without contradictions.
        length: tokens of context, the new one included, at least 1.
    """
    assert length >= 1
    return _v4_parts(config, length) if isinstance(config, ModelConfig) else _v32_parts(config, length)


def flops_per_token(config: AnyConfig, length: int) -> float:
    """Sum the FP8-equivalent FLOPs of the token at a context length."""
    return sum(part.fp8_flops for part in parts(config, length))


def flops_by_group(config: AnyConfig, length: int) -> dict[str, float]:
    """Sum the FP8-equivalent FLOPs of a token by group; a group that the architecture lacks is 0."""
    found = parts(config, length)
    return {group: sum(part.fp8_flops for part in found if part.group == group) for group in GROUPS}


def parameters(config: AnyConfig) -> Parameters:
    """Count the parameters, MTP left out; router biases and hash tables are buffers and quantisation scales belong to a format."""
    found = parts(config, 1)
    mixing = sum(part.params for part in found if part.group == "mHC")
    return Parameters(sum(part.params for part in found) - mixing, sum(part.active for part in found) - mixing, mixing)


def cache(config: AnyConfig, length: int) -> list[Cached]:
    """List the keys that a sequence of `length` tokens keeps, in the released formats.

    V4: 8-bit dimensions with a one-byte scale for every 64, rotary ones in BF16, rounded up to 8 bytes; index keys in FP4 with a one-byte
    scale for every 32. V3.2: 8-bit latents and index keys with a four-byte scale for every 128, rotary dimensions in BF16.

    Source: FlashMLA's and DeepGEMM's layouts; v4_spec 2.8, 7.
    """
    if not isinstance(config, ModelConfig):
        vectors, latent, rotary = config.num_hidden_layers * length, config.kv_lora_rank, config.qk_rope_head_dim
        main = latent + 4 * _blocks(latent, 128) + 2 * rotary
        index = config.index_head_dim + 4 * _blocks(config.index_head_dim, 128)
        return [
            Cached(name="latents", vectors=vectors, width=latent + rotary, bytes_each=main),
            Cached(name="index keys", vectors=vectors, width=config.index_head_dim, bytes_each=index),
        ]
    plain = config.head_dim - config.qk_rope_head_dim
    main = 8 * _blocks(plain + 2 * config.qk_rope_head_dim + _blocks(plain, 64), 8)
    index = _blocks(config.index_head_dim, 2) + _blocks(config.index_head_dim, 32)
    ratios = config.compress_ratios[: config.num_hidden_layers]
    entries = {ratio: ratios.count(ratio) * (length // ratio) for ratio in (CSA, HCA)}
    return [
        Cached(name="window", vectors=config.num_hidden_layers * config.sliding_window, width=config.head_dim, bytes_each=main),
        Cached(name="CSA entries", vectors=entries[CSA], width=config.head_dim, bytes_each=main),
        Cached(name="HCA entries", vectors=entries[HCA], width=config.head_dim, bytes_each=main),
        Cached(name="index keys", vectors=entries[CSA], width=config.index_head_dim, bytes_each=index),
    ]


def kv_bytes(config: AnyConfig, length: int) -> int:
    """Sum the bytes of `cache`: the window counts whole, it has its room from the first token on."""
    return sum(kind.vectors * kind.bytes_each for kind in cache(config, length))


def state_bytes(config: AnyConfig) -> int:
    """Count the bytes of the compressors' rolling states, fp32: the same at every length, and not part of the report's figure.

    Source: v4_spec 2.6.
    """
    if not isinstance(config, ModelConfig):
        return 0
    ratios = config.compress_ratios[: config.num_hidden_layers]
    overlapping = ratios.count(CSA) * 2 * CSA * 2 * (config.head_dim + config.index_head_dim)
    return 4 * 2 * (overlapping + ratios.count(HCA) * HCA * config.head_dim)  # fp32, a value and a gate


CSA, HCA = 4, 128
"""Compress ratios of the two kinds of layers with compressed entries."""


def _blocks(width: int, size: int) -> int:
    return -(-width // size)


def _matrix(name: str, group: str, precision: str, size: int) -> Part:
    """A matrix that every token is multiplied with once."""
    return Part(name=name, group=group, precision=precision, macs=size, params=size, active=size)


def _vocabulary(config: AnyConfig) -> Iterable[Part]:
    size = config.vocab_size * config.hidden_size
    yield Part(name="embed", group="head", precision="BF16", params=size)  # looked up, not multiplied
    yield _matrix("head", "head", "BF16", size)


def _experts(config: AnyConfig, layers: int, precision: str) -> Iterable[Part]:
    one = 3 * config.hidden_size * config.moe_intermediate_size
    active, held = layers * config.num_experts_per_tok * one, layers * config.n_routed_experts * one
    yield Part(name="routed experts", group="experts", precision=precision, macs=active, params=held, active=active)
    yield _matrix("shared expert", "experts", "FP8", layers * config.n_shared_experts * one)
    yield _matrix("router", "experts", "BF16", layers * config.n_routed_experts * config.hidden_size)


def _vectors(name: str, group: str, size: int) -> Part:
    """Parameters that multiply nothing but elements."""
    return Part(name=name, group=group, precision="FP32", params=size, active=size)


def _v4_parts(config: ModelConfig, length: int) -> list[Part]:
    d, layers, wide = config.hidden_size, config.num_hidden_layers, config.num_attention_heads * config.head_dim
    rank, grouped = config.q_lora_rank, config.o_groups * config.o_lora_rank
    return [
        *_vocabulary(config),
        _matrix("wq_a, wq_b", "dense", "FP8", layers * rank * (d + wide)),
        _matrix("wkv", "dense", "FP8", layers * d * config.head_dim),
        _matrix("wo_a, wo_b", "dense", "FP8", layers * (wide * config.o_lora_rank + grouped * d)),
        *_experts(config, layers, "FP4xFP8"),
        *_v4_attention(config, length),
        *_hyper_connections(config),
        _vectors("norms, sinks", "dense", layers * (2 * d + rank + config.head_dim + config.num_attention_heads) + d),
    ]


def _v4_attention(config: ModelConfig, length: int) -> Iterable[Part]:
    """Everything that depends on the kind of layer: queries on keys and values, indexers, compressors."""
    d, width, index_width = config.hidden_size, config.head_dim, config.index_head_dim
    ratios = config.compress_ratios[: config.num_hidden_layers]
    csa, hca = ratios.count(CSA), ratios.count(HCA)
    wide, index_wide = config.num_attention_heads * width, config.index_n_heads * index_width
    window = len(ratios) * min(length, config.sliding_window)
    keys = window + csa * min(length // CSA, config.index_topk) + hca * (length // HCA)
    yield Part(name="keys and values", group="core attention", precision="BF16", macs=2 * wide * keys)
    yield _matrix("indexer.wq_b", "indexer", "FP8", csa * config.q_lora_rank * index_wide)
    yield _matrix("indexer.weights_proj", "indexer", "BF16", csa * d * config.index_n_heads)
    yield Part(name="index scores", group="indexer", precision="FP4xFP4", macs=csa * (length // CSA) * index_wide)
    # wkv and wgate; the overlapping compressor of a CSA layer makes two sets of channels.
    yield _matrix("compressor", "compressor", "FP32", 2 * d * width * (2 * csa + hca))
    yield _matrix("indexer.compressor", "compressor", "FP32", 2 * d * index_width * 2 * csa)
    yield _vectors("ape, norm", "compressor", csa * (2 * CSA + 1) * (width + index_width) + hca * (HCA + 1) * width)


def _hyper_connections(config: ModelConfig) -> Iterable[Part]:
    d, streams, sublayers = config.hidden_size, config.hc_mult, 2 * config.num_hidden_layers
    mixes = (2 + streams) * streams
    yield _matrix("hc_*_fn", "mHC", "FP32", (sublayers * mixes + streams) * streams * d)
    # Into the sub-layer `streams` products a channel, out of it as many, and `streams`^2 among the streams; at the end one more merge.
    yield Part(name="stream mixing", group="mHC", precision="FP32", macs=(sublayers * mixes + streams) * d)
    yield _vectors("hc_*_base, hc_*_scale", "mHC", sublayers * (mixes + 3) + streams + 1)


def _v32_parts(config: V32Config, length: int) -> list[Part]:
    d, layers, heads = config.hidden_size, config.num_hidden_layers, config.num_attention_heads
    rank, latent, rotary = config.q_lora_rank, config.kv_lora_rank, config.qk_rope_head_dim
    plain, value = config.qk_nope_head_dim, config.v_head_dim
    first = min(config.first_k_dense_replace, layers)
    index_width, index_wide = config.index_head_dim, config.index_n_heads * config.index_head_dim
    keys = layers * min(length, config.index_topk)
    return [
        *_vocabulary(config),
        _matrix("q_a_proj, q_b_proj", "dense", "FP8", layers * rank * (d + heads * (plain + rotary))),
        _matrix("kv_a_proj_with_mqa", "dense", "FP8", layers * d * (latent + rotary)),
        # Absorbed: its key half maps each query to the latent space, its value half each head's output back.
        _matrix("kv_b_proj", "dense", "BF16", layers * latent * heads * (plain + value)),
        _matrix("o_proj", "dense", "FP8", layers * heads * value * d),
        _matrix("mlp", "dense", "FP8", first * 3 * d * config.intermediate_size),
        *_experts(config, layers - first, "FP8"),
        Part(name="keys and values", group="core attention", precision="BF16", macs=keys * heads * (2 * latent + rotary)),
        _matrix("indexer.wq_b", "indexer", "FP8", layers * rank * index_wide),
        _matrix("indexer.wk", "indexer", "FP8", layers * d * index_width),
        _matrix("indexer.weights_proj", "indexer", "BF16", layers * d * config.index_n_heads),
        Part(name="index scores", group="indexer", precision="FP8", macs=layers * length * index_wide),
        _vectors("norms", "dense", layers * (2 * d + rank + latent + 2 * index_width) + d),
    ]
