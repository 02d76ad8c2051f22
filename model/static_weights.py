"""A model's weights as a static decoding step reads them: in place, but for matrices that are read side by side."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from model.attention import Attention
from model.block import Block
from model.transformer import Transformer


@dataclass
class LayerWeights:
    """One layer's weights.

    Attributes:
        block: the layer; what is not listed here is read from its parameters.
        parts: outputs of each projection of the attention's input, by name, as they stand in `inputs` [sum, D].
        shared: [2F, D], the shared expert's w1 and w3.
        matrices: w1, w2, w3 of the routed experts as the products take them.
    """

    block: Block
    parts: dict[str, int]
    inputs: Tensor
    shared: Tensor
    matrices: tuple[Tensor, Tensor, Tensor]
    copies: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Where each copied parameter goes, and the parameter."""


class StaticWeights:
    """A model's weights at fixed addresses; after every change of the parameters `refresh` brings the copies up to date.

    Attributes:
        layers: weights of each layer.
        merge: fn, base and scale of the last merge of the streams, filled up with zeros to what `model.hyper_connections.mix_in` takes.
    """

    def __init__(self, model: Transformer) -> None:
        self._model = model
        self.merge, copies = _filled_up(model)
        self.layers = [_layer(block) for block in model.layers]  # type: ignore[arg-type]
        self._copies = _by_dtypes([*copies, *(pair for layer in self.layers for pair in layer.copies)])
        self._made_for = self._now()
        self.refresh()

    def has_moved(self) -> bool:
        """Tell whether a parameter or buffer is no longer where it was, or is read in another way."""
        return self._now() != self._made_for

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy what is kept as a copy."""
        for copies, parameters in self._copies:
            torch._foreach_copy_(copies, parameters)
        for layer in self.layers:
            experts = layer.block.ffn.experts
            if layer.matrices[0] is not experts.w1:
                for into, matrix in zip(layer.matrices, experts.matrices(), strict=True):
                    into.copy_(matrix)

    def _now(self) -> list[int | bool]:
        addresses = [tensor.data_ptr() for tensor in (*self._model.parameters(), *self._model.buffers())]
        return [*addresses, *(layer.block.ffn.experts.fp4 for layer in self.layers)]


def _by_dtypes(copies: list[tuple[Tensor, Tensor]]) -> list[tuple[list[Tensor], list[Tensor]]]:
    """List where copies go, and their parameters, for each pair of dtypes: those a GPU makes in one launch."""
    groups: dict[tuple[torch.dtype, torch.dtype], tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))
    for into, parameter in copies:
        group = groups[into.dtype, parameter.dtype]
        group[0].append(into)
        group[1].append(parameter)
    return list(groups.values())


def _filled_up(model: Transformer) -> tuple[tuple[Tensor, Tensor, Tensor], list[tuple[Tensor, Tensor]]]:
    """Make room for the last merge's parameters with as many rows as a layer's have, and say which part is whose."""
    fn, base, scale = model.hc_head_fn, model.hc_head_base, model.hc_head_scale
    streams, rows = len(fn), len(fn) * (2 + len(fn))
    room = fn.new_zeros(rows, fn.shape[1]), base.new_zeros(rows), scale.new_zeros(3)
    return room, [(room[0][:streams], fn), (room[1][:streams], base), (room[2][:1], scale)]


def _layer(block: Block) -> LayerWeights:
    inputs = _inputs(block.attn)
    shared, experts = block.ffn.shared_experts, block.ffn.experts
    own = (experts.w1, experts.w2, experts.w3)
    joint, parts = _joint(list(inputs.values()))
    both, halves = _joint([shared.w1.weight, shared.w3.weight])
    matrices = (torch.empty_like(own[0]), torch.empty_like(own[1]), torch.empty_like(own[2])) if experts.fp4 else own
    layer = LayerWeights(block, {name: len(weight) for name, weight in inputs.items()}, joint, both, matrices)
    layer.copies += [*parts, *halves]
    return layer


def _inputs(own: Attention) -> dict[str, Tensor]:
    """Name the matrices that read the attention's input."""
    found: dict[str, nn.Module] = {"latent": own.wq_a, "window": own.wkv}
    if own.compressor is not None:
        found |= {"kv": own.compressor.wkv, "gate": own.compressor.wgate}
    if own.indexer is not None:
        found |= {"index_kv": own.indexer.compressor.wkv, "index_gate": own.indexer.compressor.wgate}
        found["index_weights"] = own.indexer.weights_proj
    return {name: module.weight for name, module in found.items()}  # type: ignore[misc]


def _joint(matrices: list[Tensor]) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Make room for matrices [n_i, D] one below the other, and say which part is whose."""
    room = matrices[0].new_empty(sum(map(len, matrices)), matrices[0].shape[1])
    return room, list(zip(room.split([len(m) for m in matrices]), matrices, strict=True))
