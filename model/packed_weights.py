"""A model's weights as the compiled loops of decoding read them: matrices of one input side by side, packed into panels."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from model.attention import Attention
from model.block import Block
from model.cache import FRONT
from model.compressor import Compressor
from model.config import ModelConfig
from model.kernels.decode.attention import Compression, Projections
from model.kernels.decode.experts import ExpertWeights
from model.kernels.decode.products import pack
from model.kernels.decode.streams import Mixing
from model.moe import MoE
from model.norm import RMSNorm
from model.transformer import Transformer


class LayerWeights(NamedTuple):
    """One layer's weights as the kernels take them; what a layer lacks is None or, in the kernels' own, empty."""

    ratio: int
    attn: Mixing
    ffn: Mixing
    projections: Projections
    compressor: Compression | None
    index_compressor: Compression | None
    index_wq_b: NDArray[np.float32] | None
    weights_at: int
    experts: ExpertWeights


class PackedWeights:
    """A model's weights, packed: the matrices are copies, the rest are views."""

    def __init__(self, model: Transformer) -> None:
        assert isinstance(model.config, ModelConfig)
        self.config = model.config
        self.layers = [_layer(block) for block in model.layers]  # type: ignore[arg-type]
        self.embed = _view(model.embed.weight)
        self.merge = Mixing(pack(_view(model.hc_head_fn)), _view(model.hc_head_base), _view(model.hc_head_scale), _view(model.norm.weight))
        self.head = pack(_view(model.head.weight))


def _view(tensor: Tensor) -> NDArray[Any]:
    return np.ascontiguousarray(tensor.detach().numpy())


def _packed(*matrices: Tensor) -> NDArray[np.float32]:
    """Pack matrices that read the same input as one."""
    return pack(np.concatenate([_view(m) for m in matrices], -2))


def _layer(block: Block) -> LayerWeights:
    own = block.attn
    inputs: list[Tensor] = [own.wq_a.weight, own.wkv.weight]
    compressor = index_compressor = index_wq_b = None
    weights_at = 0
    if own.compressor is not None:
        compressor = _compression(own.compressor, inputs, FRONT + block.config.sliding_window)
    if own.indexer is not None:
        index_compressor = _compression(own.indexer.compressor, inputs, 0)
        weights_at, index_wq_b = sum(map(len, inputs)), _packed(own.indexer.wq_b.weight)
        inputs.append(own.indexer.weights_proj.weight)
    return LayerWeights(
        own.ratio,
        _mixing(block.hc_attn_fn, block.hc_attn_base, block.hc_attn_scale, norm=block.attn_norm),
        _mixing(block.hc_ffn_fn, block.hc_ffn_base, block.hc_ffn_scale, norm=block.ffn_norm),
        _projections(own, inputs),
        compressor,
        index_compressor,
        index_wq_b,
        weights_at,
        _experts(block.ffn),
    )


def _mixing(fn: Tensor, base: Tensor, scale: Tensor, *, norm: RMSNorm) -> Mixing:
    return Mixing(_packed(fn), _view(base), _view(scale), _view(norm.weight))


def _compression(compressor: Compressor, inputs: list[Tensor], entries_at: int) -> Compression:
    """Put a compressor's matrices behind the input projections and note where."""
    at = sum(map(len, inputs))
    inputs += [compressor.wkv.weight, compressor.wgate.weight]
    gate_at = at + len(compressor.wkv.weight)
    return Compression(_view(compressor.ape), _view(compressor.norm.weight), at, gate_at, entries_at)


def _projections(own: Attention, inputs: list[Tensor]) -> Projections:
    grouped = _view(own.wo_a.weight).reshape(own.wo_a.groups, -1, own.wo_a.weight.shape[1])
    return Projections(
        wide=_packed(*inputs),
        wq_b=_packed(own.wq_b.weight),
        wo_a=pack(grouped),
        wo_b=_packed(own.wo_b.weight),
        q_norm=_view(own.q_norm.weight),
        kv_norm=_view(own.kv_norm.weight),
        sink=_view(own.attn_sink),
    )


def _experts(moe: MoE) -> ExpertWeights:
    routed, shared, gate = moe.experts, moe.shared_experts, moe.gate
    count, active = len(gate.weight), gate.active
    w1, w2, w3 = (
        np.concatenate([_view(stack), _view(one.weight)[None]]) for stack, one in zip(routed.matrices(), (shared.w1, shared.w2, shared.w3))
    )
    return ExpertWeights(
        gate=_packed(gate.weight),
        w13=pack(np.concatenate([w1, w3], 1)),
        w2=pack(w2),
        bias=np.zeros(count, np.float32) if gate.bias is None else _view(gate.bias),
        table=np.zeros((0, active), np.int64) if gate.tid2eid is None else _view(gate.tid2eid),
    )
