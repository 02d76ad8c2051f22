"""The architecture's configuration: the keys of the released `config.json`, checked before anything is allocated."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any


@dataclass(kw_only=True)
class RopeScaling:
    """YaRN scaling of the rotary frequencies of layers that have a compressor. Source: released config.json."""

    type: str = "yarn"
    factor: float = 16.0
    original_max_position_embeddings: int = 65536
    beta_fast: float = 32.0
    beta_slow: float = 1.0


@dataclass(kw_only=True)
class ModelConfig:
    """One model of the DeepSeek-V4 architecture, under the released names.

    Source: config.json of the V4-Flash and V4-Pro releases.
    """

    model_type: str = "deepseek_v4"
    vocab_size: int = 129280
    """Rows of the embedding and of the head; the tokenizer may have fewer."""
    hidden_size: int = 4096
    num_hidden_layers: int = 43
    num_attention_heads: int = 64
    head_dim: int = 512
    """Width of a query head and of the one shared key-value vector."""
    qk_rope_head_dim: int = 64
    """Last dimensions of a head that carry the rotation."""
    q_lora_rank: int = 1024
    o_groups: int = 8
    o_lora_rank: int = 1024
    sliding_window: int = 128
    compress_ratios: list[int] = field(default_factory=list)
    """One entry a layer, then one an MTP layer: 0 sliding window only, 4 CSA, 128 HCA."""
    index_n_heads: int = 64
    index_head_dim: int = 128
    index_topk: int = 512
    n_routed_experts: int = 256
    n_shared_experts: int = 1
    num_experts_per_tok: int = 6
    moe_intermediate_size: int = 2048
    num_hash_layers: int = 3
    """The first layers route by a fixed table of the token id instead of the learned score."""
    routed_scaling_factor: float = 1.5
    norm_topk_prob: bool = True
    scoring_func: str = "sqrtsoftplus"
    topk_method: str = "noaux_tc"
    swiglu_limit: float = 10.0
    hc_mult: int = 4
    hc_sinkhorn_iters: int = 20
    hc_eps: float = 1e-6
    num_nextn_predict_layers: int = 1
    max_position_embeddings: int = 1048576
    rope_theta: float = 10000.0
    compress_rope_theta: float = 160000.0
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    bos_token_id: int = 0
    eos_token_id: int = 1

    def problems(self) -> list[str]:
        """List every contradiction among the fields, as `field: got, expected`; empty when the model can be built."""
        found = [
            f"{f.name}: got {v}, expected a positive number" for f in fields(self) if _must_be_positive(f.name, v := getattr(self, f.name))
        ]
        if found:
            return found  # the checks below divide by these
        layers = self.num_hidden_layers + self.num_nextn_predict_layers
        if len(self.compress_ratios) != layers:
            found.append(f"compress_ratios: got {len(self.compress_ratios)} entries, expected {layers} (one a layer, one an MTP layer)")
        if any(r not in (0, 4, 128) for r in self.compress_ratios):
            found.append(f"compress_ratios: got {sorted(set(self.compress_ratios))}, expected only 0, 4 and 128")
        if any(self.compress_ratios[self.num_hidden_layers :]):
            found.append("compress_ratios: the MTP layer's entry must be 0")
        if not 0 <= self.num_hash_layers <= self.num_hidden_layers:
            found.append(f"num_hash_layers: got {self.num_hash_layers}, expected 0 to num_hidden_layers = {self.num_hidden_layers}")
        if self.qk_rope_head_dim % 2 or not 0 < self.qk_rope_head_dim <= min(self.head_dim, self.index_head_dim):
            found.append(f"qk_rope_head_dim: got {self.qk_rope_head_dim}, expected an even number up to head_dim and index_head_dim")
        if self.num_attention_heads % self.o_groups:
            found.append(f"o_groups: got {self.o_groups}, expected a divisor of num_attention_heads = {self.num_attention_heads}")
        if not 0 < self.num_experts_per_tok <= self.n_routed_experts:
            found.append(f"num_experts_per_tok: got {self.num_experts_per_tok}, expected 1 to n_routed_experts = {self.n_routed_experts}")
        if self.n_shared_experts != 1:
            found.append(f"n_shared_experts: got {self.n_shared_experts}, expected 1")
        if self.num_nextn_predict_layers not in (0, 1):
            found.append(f"num_nextn_predict_layers: got {self.num_nextn_predict_layers}, expected 0 or 1")
        if self.scoring_func != "sqrtsoftplus":
            found.append(f"scoring_func: got {self.scoring_func!r}, expected 'sqrtsoftplus'")
        if self.model_type != "deepseek_v4":
            found.append(f"model_type: got {self.model_type!r}, expected 'deepseek_v4'")
        return found

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """Build from the keys of a `config.json`; keys of the release that this architecture does not read are ignored."""
        known = {f.name for f in fields(cls)}
        kept = {k: v for k, v in values.items() if k in known}
        if isinstance(kept.get("rope_scaling"), dict):
            names = {f.name for f in fields(RopeScaling)}
            kept["rope_scaling"] = RopeScaling(**{k: v for k, v in kept["rope_scaling"].items() if k in names})
        return cls(**kept)

    @classmethod
    def from_file(cls, path: Path) -> ModelConfig:
        """Read a `config.json`.

        Raises:
            ValueError: the file's fields contradict each other; the message names file, field, value and expectation.
        """
        try:
            values = json.loads(Path(path).read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: damaged: {error}") from error
        config = cls.from_dict(values)
        if found := config.problems():
            raise ValueError(f"{path}: " + "; ".join(found))
        return config

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values, ready for `config.json`."""
        return asdict(self)


_POSITIVE = {
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim", "q_lora_rank", "o_groups", "o_lora_rank",
    "sliding_window", "index_n_heads", "index_head_dim", "index_topk", "n_routed_experts", "moe_intermediate_size", "hc_mult",
    "hc_sinkhorn_iters", "max_position_embeddings", "rms_norm_eps",
}  # fmt: skip


def _must_be_positive(name: str, value: Any) -> bool:
    return name in _POSITIVE and value <= 0
