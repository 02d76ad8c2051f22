"""What a user may set about GRPO."""

from dataclasses import dataclass, field

from runtime.config import OptimizerConfig


@dataclass(kw_only=True)
class GrpoConfig:
    """Group relative policy optimisation. Source: DeepSeek-V3.2 paper, section 3.1; DeepSeek-V4 report, section 5.1."""

    steps: int = 40
    prompts_per_step: int = 16
    samples_per_prompt: int = 8
    train_prompts: int = 4096
    """Different training prompts drawn."""
    updates_per_rollout: int = 1
    """Optimizer steps a rollout is split into; above 1 the later ones are off-policy and the clip matters."""
    clip_low: float = 0.2
    clip_high: float = 0.28
    kl_weight: float = 0.0
    """Weight of the unbiased KL to the SFT checkpoint; 0 loads no reference."""
    off_policy_mask_nats: float = 0.0
    """Mask a sample with negative advantage whose mean log-ratio exceeds this; 0 masks none."""
    mismatch_limit_nats: float = 0.02
    """Stop when the rollout's and the trainer's log-probs on the same tokens part by more, as mean k3 KL."""
    infrastructure_limit: float = 0.1
    """Stop when more than this share of a step's verdicts are infrastructure failures."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    save_every: int = 10
