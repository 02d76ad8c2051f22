"""What a user may set about supervised training."""

from dataclasses import dataclass, field

from runtime.config import OptimizerConfig


@dataclass(kw_only=True)
class SupervisedConfig:
    """Next-token training: of the base on documents, of a specialist or the student's warm-up on demonstrations."""

    steps: int = 100
    tokens_per_step: int = 8192
    """Tokens of one optimizer step, over all ranks."""
    demonstrations: int = 1000
    """Different demonstrations drawn per domain (documents for the base)."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    balance_loss_weight: float = 1e-4
    router_bias_speed: float = 1e-3
    mtp_loss_weight: float = 0.0
    indexer_loss_weight: float = 0.0
    """0 leaves the indexers as they are. Otherwise they learn to select what the attention looks at, V3.2's two stages in one run."""
    indexer_dense_steps: int = 0
    """First steps whose attention sees everything, for the indexers to learn from; afterwards it sees what they select."""
    save_every: int = 50
