"""The architectures' configurations: the keys of the released `config.json`, checked before anything is allocated."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Self, TypeAlias


@dataclass(kw_only=True)
class RopeScaling:
    """YaRN scaling of the rotary frequencies. Source: config.json of the V4 releases."""

    type: str = "yarn"
    factor: float = 16.0
    original_max_position_embeddings: int = 65536
    beta_fast: float = 32.0
    beta_slow: float = 1.0


@dataclass(kw_only=True)
class V32RopeScaling(RopeScaling):
    """YaRN with the attention temperature of V3.2. Source: config.json of the V3.2 release."""

    factor: float = 40.0
    original_max_position_embeddings: int = 4096
    mscale: float = 1.0
    """Temperature of the rotations; only its ratio to the next one matters, which must be 1."""
    mscale_all_dim: float = 1.0
    """Temperature of the scores: they grow by (0.1 * mscale_all_dim * ln(factor) + 1)^2; 0 for none."""


@dataclass(kw_only=True)
class ArchitectureConfig:
    """The keys that V4 and V3.2 share, with V4-Flash's values."""

    model_type: str = "deepseek_v4"
    vocab_size: int = 129280
    """Rows of the embedding and of the head; the tokenizer may have fewer."""
    hidden_size: int = 4096
    num_hidden_layers: int = 43
    num_attention_heads: int = 64
    qk_rope_head_dim: int = 64
    """Last dimensions of a head that carry the rotation."""
    q_lora_rank: int = 1024
    index_n_heads: int = 64
    index_head_dim: int = 128
    index_topk: int = 512
    n_routed_experts: int = 256
    n_shared_experts: int = 1
    num_experts_per_tok: int = 6
    moe_intermediate_size: int = 2048
    routed_scaling_factor: float = 1.5
    norm_topk_prob: bool = True
    scoring_func: str = "sqrtsoftplus"
    topk_method: str = "noaux_tc"
    num_nextn_predict_layers: int = 1
    max_position_embeddings: int = 1048576
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    bos_token_id: int = 0
    eos_token_id: int = 1

    def problems(self) -> list[str]:
        """List every contradiction among the fields, as `field: got, expected`; empty when the model can be built."""
        # What follows a wrong type or a size of 0 would stumble over it.
        return self._mistyped() or self._not_positive() or [*self._shared_problems(), *self._own_problems()]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Build from the keys of a `config.json`; keys of the release that this architecture does not read are ignored."""
        known = {f.name: f for f in fields(cls)}
        kept = {k: v for k, v in values.items() if k in known}
        if isinstance(scaling := kept.get("rope_scaling"), dict):
            made: Any = known["rope_scaling"].default_factory
            names = {f.name for f in fields(made)}
            kept["rope_scaling"] = made(**{k: v for k, v in scaling.items() if k in names})
        return cls(**kept)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values, ready for `config.json`."""
        return asdict(self)

    def _own_problems(self) -> list[str]:
        """List what only one of the architectures has."""
        raise NotImplementedError

    def _mistyped(self) -> list[str]:
        found = []
        for prefix, node in (("", self), ("rope_scaling.", self.rope_scaling)):
            if not isinstance(node, (ArchitectureConfig, RopeScaling)):
                return [*found, f"rope_scaling: got {node!r}, expected an object with YaRN's numbers"]
            for f in fields(node):
                value = getattr(node, f.name)
                if f.type in _TYPES and not _is_a(value, str(f.type)):
                    found.append(f"{prefix}{f.name}: got {value!r}, expected {_TYPES[str(f.type)]}")
        return found

    def _not_positive(self) -> list[str]:
        found = [
            f"{f.name}: got {value}, expected a positive number"
            for f in fields(self)
            if f.name in _POSITIVE and (value := getattr(self, f.name)) <= 0
        ]
        scaling = self.rope_scaling
        if scaling.factor < 1:
            found.append(f"rope_scaling.factor: got {scaling.factor}, expected at least 1")
        if scaling.original_max_position_embeddings <= 0:
            found.append(f"rope_scaling.original_max_position_embeddings: got {scaling.original_max_position_embeddings}, expected above 0")
        return found

    def _shared_problems(self) -> list[str]:
        found = []
        if self.rope_scaling.type != "yarn":
            found.append(f"rope_scaling.type: got {self.rope_scaling.type!r}, expected 'yarn'")
        if not self.rope_scaling.beta_fast > self.rope_scaling.beta_slow > 0:
            got = f"rope_scaling.beta_fast: got {self.rope_scaling.beta_fast}"
            found.append(f"{got}, expected more than beta_slow = {self.rope_scaling.beta_slow}, which must be above 0")
        if self.qk_rope_head_dim % 2:
            found.append(f"qk_rope_head_dim: got {self.qk_rope_head_dim}, expected an even number: rotations act on pairs")
        if self.index_head_dim % 2 or self.index_head_dim < self.qk_rope_head_dim:
            got = f"index_head_dim: got {self.index_head_dim}"
            found.append(f"{got}, expected an even number of at least qk_rope_head_dim = {self.qk_rope_head_dim}")
        if self.num_experts_per_tok > self.n_routed_experts:
            found.append(f"num_experts_per_tok: got {self.num_experts_per_tok}, expected 1 to n_routed_experts = {self.n_routed_experts}")
        if self.num_nextn_predict_layers not in (0, 1):
            found.append(f"num_nextn_predict_layers: got {self.num_nextn_predict_layers}, expected 0 or 1")
        if self.topk_method != "noaux_tc":
            found.append(f"topk_method: got {self.topk_method!r}, expected 'noaux_tc'")
        for name in ("bos_token_id", "eos_token_id"):
            if not 0 <= getattr(self, name) < self.vocab_size:
                found.append(f"{name}: got {getattr(self, name)}, expected 0 to below vocab_size = {self.vocab_size}")
        return found

    def _must_be(self, **expected: Any) -> list[str]:
        return [f"{n}: got {getattr(self, n)!r}, expected {value!r}" for n, value in expected.items() if getattr(self, n) != value]


@dataclass(kw_only=True)
class ModelConfig(ArchitectureConfig):
    """One model of the DeepSeek-V4 architecture, under the released names.

    Source: config.json of the V4-Flash and V4-Pro releases.
    """

    head_dim: int = 512
    """Width of a query head and of the one shared key-value vector."""
    o_groups: int = 8
    o_lora_rank: int = 1024
    sliding_window: int = 128
    compress_ratios: list[int] = field(default_factory=list)
    """One entry a layer, then one an MTP layer: 0 sliding window only, 4 CSA, 128 HCA."""
    num_hash_layers: int = 3
    """The first layers route by a fixed table of the token id instead of the learned score."""
    swiglu_limit: float = 10.0
    hc_mult: int = 4
    hc_sinkhorn_iters: int = 20
    hc_eps: float = 1e-6
    compress_rope_theta: float = 160000.0

    n_group: ClassVar[int] = 1
    topk_group: ClassVar[int] = 1
    """V4 routes without groups."""

    @property
    def key_width(self) -> int:
        """Width of what attention keeps for a token."""
        return self.head_dim

    def rope(self, *, compressed: bool) -> tuple[float, RopeScaling | None]:
        """Return base and scaling of the rotary frequencies of layers that compress, or of those with a sliding window only."""
        return (self.compress_rope_theta, self.rope_scaling) if compressed else (self.rope_theta, None)

    def _own_problems(self) -> list[str]:
        found = self._must_be(model_type="deepseek_v4", scoring_func="sqrtsoftplus", n_shared_experts=1)
        layers = self.num_hidden_layers + self.num_nextn_predict_layers
        if len(self.compress_ratios) != layers:
            found.append(f"compress_ratios: got {len(self.compress_ratios)} entries, expected {layers} (one a layer, one an MTP layer)")
        if any(r not in (0, 4, 128) for r in self.compress_ratios):
            found.append(f"compress_ratios: got {sorted(set(self.compress_ratios))}, expected only 0, 4 and 128")
        if any(self.compress_ratios[self.num_hidden_layers : layers]):
            found.append(f"compress_ratios: got {self.compress_ratios[self.num_hidden_layers : layers]} for the MTP layer, expected 0")
        if not 0 <= self.num_hash_layers <= self.num_hidden_layers:
            found.append(f"num_hash_layers: got {self.num_hash_layers}, expected 0 to num_hidden_layers = {self.num_hidden_layers}")
        if self.head_dim % 2 or self.head_dim < self.qk_rope_head_dim:
            got = f"head_dim: got {self.head_dim}"
            found.append(f"{got}, expected an even number of at least qk_rope_head_dim = {self.qk_rope_head_dim}")
        if self.num_attention_heads % self.o_groups:
            found.append(f"o_groups: got {self.o_groups}, expected a divisor of num_attention_heads = {self.num_attention_heads}")
        return found


@dataclass(kw_only=True)
class V32Config(ArchitectureConfig):
    """One model of the DeepSeek-V3.2 architecture, under the released names.

    Source: config.json of the V3.2 release.
    """

    model_type: str = "deepseek_v32"
    hidden_size: int = 7168
    num_hidden_layers: int = 61
    num_attention_heads: int = 128
    q_lora_rank: int = 1536
    index_topk: int = 2048
    num_experts_per_tok: int = 8
    routed_scaling_factor: float = 2.5
    scoring_func: str = "sigmoid"
    num_nextn_predict_layers: int = 1
    """The release's MTP block; it is not built, and its weights are skipped."""
    max_position_embeddings: int = 163840
    rope_scaling: V32RopeScaling = field(default_factory=V32RopeScaling)
    kv_lora_rank: int = 512
    """Width of the latent that all heads' keys and values are made from."""
    qk_nope_head_dim: int = 128
    """Dimensions of a query head before the rotated ones."""
    v_head_dim: int = 128
    intermediate_size: int = 18432
    """Width of the first layers' dense feed-forward networks."""
    first_k_dense_replace: int = 3
    n_group: int = 8
    topk_group: int = 4
    """A token's experts come from its best groups only."""

    swiglu_limit: ClassVar[float] = math.inf
    num_hash_layers: ClassVar[int] = 0
    sliding_window: ClassVar[int] = 0
    hc_mult: ClassVar[int] = 1
    """What V4 has and V3.2 lacks, as the modules that both share read it: no clamp, no table, no window, one residual stream."""

    @property
    def compress_ratios(self) -> list[int]:
        """Every token is an entry of its own that the indexer may select, in every layer."""
        return [1] * self.num_hidden_layers

    @property
    def key_width(self) -> int:
        """Width of what attention keeps for a token: the latent and the rotated part of the key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """What queries times keys are multiplied by. Source: v4_spec 2.8; YaRN paper, attention temperature."""
        temperature = 0.1 * self.rope_scaling.mscale_all_dim * math.log(self.rope_scaling.factor) + 1
        return (self.qk_nope_head_dim + self.qk_rope_head_dim) ** -0.5 * temperature**2

    def rope(self, *, compressed: bool) -> tuple[float, RopeScaling | None]:
        """Return base and scaling of the rotary frequencies, one for all layers."""
        return self.rope_theta, self.rope_scaling

    def _own_problems(self) -> list[str]:
        found = self._must_be(model_type="deepseek_v32", scoring_func="sigmoid")
        if not 0 <= self.first_k_dense_replace <= self.num_hidden_layers:
            got = f"first_k_dense_replace: got {self.first_k_dense_replace}"
            found.append(f"{got}, expected 0 to num_hidden_layers = {self.num_hidden_layers}")
        if self.rope_scaling.mscale != self.rope_scaling.mscale_all_dim:
            got = f"rope_scaling.mscale: got {self.rope_scaling.mscale}"
            found.append(f"{got}, expected mscale_all_dim = {self.rope_scaling.mscale_all_dim}")
        if self.n_routed_experts % self.n_group:
            found.append(f"n_group: got {self.n_group}, expected a divisor of n_routed_experts = {self.n_routed_experts}")
        if self.topk_group > self.n_group:
            found.append(f"topk_group: got {self.topk_group}, expected 1 to n_group = {self.n_group}")
        elif self.topk_group * (self.n_routed_experts // self.n_group) < self.num_experts_per_tok:
            reachable = self.topk_group * (self.n_routed_experts // self.n_group)
            found.append(f"topk_group: got {self.topk_group}, whose groups hold {reachable} experts, expected num_experts_per_tok of them")
        for name in ("qk_nope_head_dim", "v_head_dim", "kv_lora_rank"):
            if getattr(self, name) % 2:
                found.append(f"{name}: got {getattr(self, name)}, expected an even number")
        return found


AnyConfig: TypeAlias = ModelConfig | V32Config
"""A configuration that a model can be built from."""

ARCHITECTURES: dict[str, type[ModelConfig] | type[V32Config]] = {"deepseek_v4": ModelConfig, "deepseek_v32": V32Config}


def load_config(path: Path) -> AnyConfig:
    """Read a `config.json` of either architecture.

    Raises:
        ValueError: the file is damaged or its fields contradict each other; the message names file, fields, values and expectations.
        FileNotFoundError: there is no such file.
    """
    try:
        values = json.loads(Path(path).read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: damaged: {error}") from error
    try:
        return parse_config(values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def parse_config(values: dict[str, Any]) -> AnyConfig:
    """Build the configuration that `model_type` names from the keys of a `config.json`.

    Raises:
        ValueError: all contradictions at once.
    """
    if not isinstance(values, dict):
        raise ValueError(f"got {type(values).__name__}, expected an object with the keys of config.json")
    kind = values.get("model_type")
    if kind not in ARCHITECTURES:
        raise ValueError(f"model_type: got {kind!r}, expected {' or '.join(map(repr, ARCHITECTURES))}")
    config: AnyConfig = ARCHITECTURES[kind].from_dict(values)
    found = config.problems()
    fixed = _FIXED | ({"num_key_value_heads": 1} if config.model_type == ModelConfig.model_type else {})
    found += [f"{name}: got {values[name]!r}, expected {v!r}" for name, v in fixed.items() if values.get(name, v) != v]
    if found:
        raise ValueError("; ".join(found))
    return config


_FIXED = {
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "moe_layer_freq": 1,
}
"""Keys of a `config.json` that no model here varies; another value would be another computation."""

_POSITIVE = {
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim", "q_lora_rank", "o_groups", "o_lora_rank",
    "sliding_window", "index_n_heads", "index_head_dim", "index_topk", "n_routed_experts", "n_shared_experts", "moe_intermediate_size",
    "num_experts_per_tok", "qk_rope_head_dim", "routed_scaling_factor", "swiglu_limit", "hc_mult", "hc_sinkhorn_iters",
    "max_position_embeddings", "rope_theta", "compress_rope_theta", "rms_norm_eps", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim",
    "intermediate_size", "n_group", "topk_group",
}  # fmt: skip

_TYPES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "a text",
    "list[int]": "a list of whole numbers",
}


def _is_a(value: Any, kind: str) -> bool:
    """Say whether a value read from a file has a field's type; a whole number is a number, truth is neither."""
    if kind == "list[int]":
        return isinstance(value, list) and all(_is_a(item, "int") for item in value)
    if kind in ("bool", "str"):
        return isinstance(value, {"bool": bool, "str": str}[kind])
    return isinstance(value, int if kind == "int" else (int, float)) and not isinstance(value, bool) and math.isfinite(value)
