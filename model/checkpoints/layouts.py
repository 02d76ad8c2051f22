"""The layouts of a checkpoint: under which names, and in which pieces, the tensors of a model lie in its files.

`native`: the model's own state, routed experts stacked; what steps hand to each other.
`official`: the release's: one tensor an expert and matrix.
`transformers`: what `save_pretrained` writes: the release's names behind its own prefixes, one tensor an expert and matrix.
`transformers-stacked`: the names of that library's modules, experts stacked and gate joined with up; read, never written.

Another architecture is another entry of `FAMILIES`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple

Shape = tuple[int, ...]
Renames = tuple[tuple[str, str], ...]


class Part(NamedTuple):
    """Where a stored tensor, or some of its rows, belongs.

    Attributes:
        target: name in the model's state.
        expert: index into the target's first dimension; None for the whole target.
        rows: range of the stored tensor's second dimension; None for all.
    """

    target: str
    expert: int | None = None
    rows: tuple[int, int] | None = None


class Slot(NamedTuple):
    """One stored tensor: the shape of its values and the parts of the model they fill."""

    shape: Shape
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Layout:
    """How one layout spells a model's state.

    Attributes:
        name: what a user calls it.
        renames: regular expressions and replacements, applied in order to each name of the model's state.
        experts: how routed experts lie: `stacked` as in the model, `split` one by one, `joined` stacked with gate and up in one tensor.
        matrices: what a split expert's gate, down and up are called.
    """

    name: str
    renames: Renames = ()
    experts: str = "stacked"
    matrices: tuple[str, str, str] = ("w1", "w2", "w3")


@dataclass(frozen=True)
class Family:
    """The layouts of one architecture and what its release stores in which format.

    Attributes:
        layouts: those that can be read, by name; where several fit equally well the first is taken.
        fp32: names in the model's state that the release keeps in fp32, whatever the precision of the rest.
        fp8: names of the matrices that the release keeps in FP8; routed experts are not among them.
        experts: format of the routed experts in the release, `fp4` or `fp8`.
        scale: how the name of a matrix's scales ends in the release, instead of `.weight`.
        skipped: stored tensors that no model of ours has; group 1, if any, is a layer's number and must be past the last.
    """

    layouts: dict[str, Layout]
    fp32: re.Pattern[str]
    fp8: re.Pattern[str]
    experts: str
    scale: str
    skipped: re.Pattern[str] | None = None

    def format(self, name: str) -> str:
        """Return how the release stores a floating-point tensor of the model's state: `fp32`, `bf16`, `fp8` or `fp4`."""
        if EXPERTS.match(name):
            return self.experts
        return "fp32" if self.fp32.search(name) else "fp8" if self.fp8.search(name) else "bf16"


EXPERTS = re.compile(r"(?P<stem>.*\.ffn\.experts)\.(?P<matrix>w[123])$")
"""The stacked matrices of the routed experts in a model's state: w1 gate, w3 up [E, F, D], w2 down [E, D, F]."""

_V4_SAVED: Renames = (
    (r"^embed\.", "model.embed_tokens."),
    (r"^hc_head_", "model.hc_head.hc_"),
    (r"^(layers|norm)\.", r"model.\1."),
    (r"^(model\.layers\.\d+\.attn)\.kv_norm\.", r"\1.norm."),
)
"""What transformers 5.23 writes for DeepseekV4ForCausalLM: its conversion turns most names, not all, back into the release's."""

_V4_MODULES: Renames = (
    (r"^embed\.", "model.embed_tokens."),
    (r"^head\.", "lm_head."),
    (r"^hc_head_", "model.hc_head.hc_"),
    (r"^(layers|norm)\.", r"model.\1."),
    (r"^(model\.layers\.\d+)\.hc_(attn|ffn)_", r"\1.\2_hc."),
    (r"^(model\.layers\.\d+)\.attn_norm\.", r"\1.input_layernorm."),
    (r"^(model\.layers\.\d+)\.ffn_norm\.", r"\1.post_attention_layernorm."),
    (r"^(model\.layers\.\d+)\.attn\.", r"\1.self_attn."),
    (r"^(model\.layers\.\d+)\.ffn\.", r"\1.mlp."),
    (r"(\.self_attn)\.attn_sink$", r"\1.sinks"),
    (r"(\.self_attn)\.indexer\.compressor\.", r"\1.compressor.indexer."),
    (r"(\.self_attn)\.indexer\.wq_b\.", r"\1.compressor.indexer.q_b_proj."),
    (r"(\.self_attn)\.indexer\.weights_proj\.", r"\1.compressor.indexer.scorer.weights_proj."),
    (r"(\.self_attn\.compressor(?:\.indexer)?)\.norm\.", r"\1.kv_norm."),
    (r"(\.self_attn\.compressor(?:\.indexer)?)\.ape$", r"\1.position_bias"),
    (r"(\.self_attn(?:\.compressor(?:\.indexer)?)?)\.wkv\.", r"\1.kv_proj."),
    (r"(\.self_attn\.compressor(?:\.indexer)?)\.wgate\.", r"\1.gate_proj."),
    (r"(\.self_attn)\.w([qo])_([ab])\.", r"\1.\2_\3_proj."),
    (r"(\.self_attn)\.q_norm\.", r"\1.q_a_norm."),
    (r"(\.mlp\.gate)\.bias$", r"\1.e_score_correction_bias"),
    (r"(\.mlp\.shared_experts)\.w1\.", r"\1.gate_proj."),
    (r"(\.mlp\.shared_experts)\.w2\.", r"\1.down_proj."),
    (r"(\.mlp\.shared_experts)\.w3\.", r"\1.up_proj."),
)
"""The module names of transformers 5.23's DeepseekV4ForCausalLM; it has no MTP, whose names stay the release's."""


_V32: Renames = (
    (r"^embed\.", "model.embed_tokens."),
    (r"^head\.", "lm_head."),
    (r"^(layers|norm)\.", r"model.\1."),
    (r"\.attn_norm\.", ".input_layernorm."),
    (r"\.ffn_norm\.", ".post_attention_layernorm."),
    (r"\.attn\.", ".self_attn."),
    (r"\.ffn\.", ".mlp."),
    (r"(\.self_attn)\.wkv_a\.", r"\1.kv_a_proj_with_mqa."),
    (r"(\.self_attn)\.w(q_a|q_b|kv_b|o)\.", r"\1.\2_proj."),
    (r"(\.self_attn)\.(q|kv)_norm\.", r"\1.\2_a_layernorm."),
    (r"(\.mlp\.gate)\.bias$", r"\1.e_score_correction_bias"),
    (r"(\.mlp(?:\.shared_experts)?)\.w1\.", r"\1.gate_proj."),
    (r"(\.mlp(?:\.shared_experts)?)\.w2\.", r"\1.down_proj."),
    (r"(\.mlp(?:\.shared_experts)?)\.w3\.", r"\1.up_proj."),
)
"""The names of the V3.2 release, which are also the module names of transformers 5.23's DeepseekV32ForCausalLM."""

_V32_MATRICES = ("gate_proj", "down_proj", "up_proj")


def _by_name(*layouts: Layout) -> dict[str, Layout]:
    return {layout.name: layout for layout in layouts}


FAMILIES: dict[str, Family] = {
    "deepseek_v4": Family(
        layouts=_by_name(
            Layout("native"),
            Layout("official", experts="split"),
            Layout("transformers", _V4_SAVED, experts="split"),
            Layout("transformers-stacked", _V4_MODULES, experts="joined"),
        ),
        fp32=re.compile(r"(^|[._])(hc_(attn|ffn|head)_(fn|base|scale)|attn_sink|ape|gate\.bias)$"),
        fp8=re.compile(r"(\.attn\.(wq_a|wq_b|wkv|wo_a|wo_b)|\.indexer\.wq_b|\.shared_experts\.w[123]|^mtp\.\d+\.[eh]_proj)\.weight$"),
        experts="fp4",
        scale=".scale",
    ),
    "deepseek_v32": Family(
        layouts=_by_name(
            Layout("native"),
            Layout("official", _V32, experts="split", matrices=_V32_MATRICES),
            Layout("transformers", _V32, experts="split", matrices=_V32_MATRICES),
            Layout("transformers-stacked", _V32, experts="joined"),
        ),
        fp32=re.compile(r"(\.gate\.bias|\.indexer\.(k_norm\.(weight|bias)|weights_proj\.weight))$"),
        fp8=re.compile(r"(\.attn\.(wq_a|wq_b|wkv_a|wkv_b|wo)|\.indexer\.(wq_b|wk)|\.ffn(\.shared_experts)?\.w[123])\.weight$"),
        experts="fp8",
        scale=".weight_scale_inv",
        skipped=re.compile(r"^model\.layers\.(\d+)\."),
    ),
}
"""By `model_type` of the configuration. Source: v4_spec 2.7 and 2.8."""

SCALES = (".scale", ".weight_scale_inv")
"""How names of scales may end in the files, instead of `.weight`."""

WRITTEN = ("native", "official", "transformers")


def slots(layout: Layout, shapes: Mapping[str, Shape]) -> dict[str, Slot]:
    """List the tensors that a checkpoint of this layout holds, scales aside.

    Args:
        layout: how they are spelled.
        shapes: of the model's state, by name.

    Returns:
        what each stored tensor fills, by its name in the files, in the order of the model's state.
    """
    found: dict[str, Slot] = {}
    for name, shape in shapes.items():
        match = EXPERTS.match(name)
        if match is None or layout.experts == "stacked":
            found[_renamed(layout, name)] = Slot(shape, (Part(name),))
        elif layout.experts == "split" or name.startswith("mtp."):
            stem, matrix = _renamed(layout, match["stem"]), layout.matrices[int(match["matrix"][1]) - 1]
            for expert in range(shape[0]):
                found[f"{stem}.{expert}.{matrix}.weight"] = Slot(shape[1:], (Part(name, expert),))
        elif match["matrix"] == "w2":
            found[f"{_renamed(layout, match['stem'])}.down_proj"] = Slot(shape, (Part(name),))
        elif match["matrix"] == "w1":
            experts, inner, width = shape
            parts = (Part(name, rows=(0, inner)), Part(f"{match['stem']}.w3", rows=(inner, 2 * inner)))
            found[f"{_renamed(layout, match['stem'])}.gate_up_proj"] = Slot((experts, 2 * inner, width), parts)
    return found


def detect(family: Family, shapes: Mapping[str, Shape], names: Collection[str]) -> Layout:
    """Find the layout that spells most of the tensors found in the files."""
    there = set(names)
    return max(family.layouts.values(), key=lambda layout: len(there & slots(layout, shapes).keys()))


def _renamed(layout: Layout, name: str) -> str:
    for pattern, replacement in layout.renames:
        name = re.sub(pattern, replacement, name)
    return name
