"""What a user may set about processes, optimizer, sampling and tracking."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(kw_only=True)
class OptimizerConfig:
    """Muon for matrices, AdamW for the rest. Source: DeepSeek-V4 report, sections 2.4 and 4.2.2."""

    name: str = "muon"
    """`muon` (hybrid: AdamW for vectors, embedding and head) or `adamw` for everything."""
    lr: float = 3e-4
    warmup_steps: int = 0
    final_lr_ratio: float = 0.1
    """The cosine ends at lr times this."""
    weight_decay: float = 0.1
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-20
    momentum: float = 0.95
    update_rms: float = 0.18
    """Root mean square of a Muon update before the learning rate."""
    grad_clip: float = 1.0


@dataclass(kw_only=True)
class QuantizationConfig:
    """Which of inference's low precisions training, sampling, teachers and references compute with. Source: V4 report 5.2.1."""

    experts: bool = False
    """Routed experts in MXFP4."""
    indexer: bool = False
    """Index queries and keys in MXFP4."""
    kv: bool = False
    """Cached keys in FP8, V4 only."""


@dataclass(kw_only=True)
class EngineConfig:
    """How a step's ranks train."""

    quantization: QuantizationConfig = field(default_factory=QuantizationConfig)

    deepspeed: dict[str, Any] = field(default_factory=dict)
    """DeepSpeed's own keys, verbatim (`zero_optimization`, `bf16` ...)."""
    row_tokens: int = 2048
    """Tokens of one packed row, one forward pass. Memory grows with it."""
    kernels: str = "auto"
    """`triton` or `reference` (plain torch); `auto` is Triton on a GPU."""


@dataclass(kw_only=True)
class ClusterConfig:
    """What Ray reserves."""

    address: str = "local"
    """`local` starts Ray on this machine; otherwise the address of a running cluster."""
    ranks: int = 1
    """Training ranks (data parallel) of a step that has the cluster to itself: base, distillation."""
    expert_ranks: int = 1
    """Training ranks of a step that shares the cluster with others: a specialist's, the student's warm-up."""
    cpus_per_rank: float = 1.0
    """What Ray reserves for a rank; below 1 lets more experts than cores run side by side."""
    threads_per_rank: int = 1
    """Threads that a rank computes with."""
    gpus_per_rank: float = 0.0
    parallel_steps: int = 0
    """Steps side by side at most; 0: as many as the resources hold."""
    dashboard: bool = True
    dashboard_port: int = 8265


@dataclass(kw_only=True)
class SamplingConfig:
    """How a rollout samples."""

    temperature: float = 1.0
    """0 is greedy."""
    max_new_tokens: int = 128
    """Sampled tokens of one sample, all turns together."""
    max_turns: int = 1
    """Assistant turns; above 1 only for domains with an environment."""
    rows: int = 256
    """Samples that one rank decodes together."""
    speculative: bool = False
    """Let the model's MTP block draft every other token; what is sampled has the same distribution."""


@dataclass(kw_only=True)
class EvaluationConfig:
    """How a checkpoint is evaluated: greedy, on held-out prompts."""

    prompts: int = 200


@dataclass(kw_only=True)
class TrackingConfig:
    """Where metrics go besides `metrics.jsonl`."""

    wandb: str = "offline"
    """`offline`, `online`, or `off` (W&B is then never imported)."""
    project: str = "v4-post-training"
