"""The keys that DeepSpeed gets: the configuration's own, and what the engine builds on."""

from __future__ import annotations

from typing import Any

from runtime.spec import EngineSpec


def deepspeed_config(spec: EngineSpec) -> tuple[dict[str, Any], float | None]:
    """Return DeepSpeed's configuration, and the norm to clip to where `runtime.clipping` replaces DeepSpeed's clipping: at ZeRO 1."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": spec.optimizer.grad_clip,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
        "timers": {"throughput": {"enabled": False}},  # it would wait for the GPU before every row, and nobody reads it
    } | spec.deepspeed
    zero = config.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    if config.get("bf16", {}).get("enabled"):
        # DeepSpeed looks at every gradient on its own, some 1700 launches a step; below stage 2 their norms are enough.
        config["bf16"] = {"check_grad_overflow": stage >= 2} | config["bf16"]
    if stage != 1 or zero.get("offload_optimizer"):
        return config, None
    most = config["gradient_clipping"]
    return config | {"gradient_clipping": 0.0, "zero_optimization": {**zero, "compute_grad_norm": False}}, most
