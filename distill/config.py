"""What a user may set about on-policy distillation."""

from dataclasses import dataclass, field

from runtime.config import OptimizerConfig


@dataclass(kw_only=True)
class DistillConfig:
    """Multi-teacher on-policy distillation with the exact reverse KL. Source: DeepSeek-V4 report, section 5.1.2."""

    steps: int = 40
    prompts_per_step: int = 48
    """Over all domains together; each domain gets its share by `weights`."""
    samples_per_prompt: int = 1
    train_prompts: int = 4096
    """Different training prompts drawn per domain."""
    weights: dict[str, float] = field(default_factory=dict)
    """Domain name to its share of the prompts; a domain left out weighs 1."""
    init: str = "warmup"
    """Where the student starts: `warmup` (base after supervised training on all domains) or `base`."""
    chunk_tokens: int = 1024
    """Tokens whose logits exist at once in the loss."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    save_every: int = 10
