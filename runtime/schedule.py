"""The learning rate over a stage. Knows no torch, so that loops stay light."""

from __future__ import annotations

import math

from runtime.config import OptimizerConfig


def learning_rate(step: int, *, config: OptimizerConfig, steps: int) -> float:
    """Return the learning rate of optimizer step `step` (0-based): linear warm-up, then a cosine down to lr * final_lr_ratio."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    return config.lr * (config.final_lr_ratio + (1 - config.final_lr_ratio) * 0.5 * (1 + math.cos(math.pi * done)))
