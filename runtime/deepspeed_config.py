"""The keys that DeepSpeed gets: the configuration's own, and what the engine builds on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from runtime.spec import EngineSpec

FP32 = ("fp32", "float32", "float", "torch.float32")
"""Names that DeepSpeed has for it."""


def deepspeed_config(spec: EngineSpec) -> tuple[dict[str, Any], float | None]:
    """Return DeepSpeed's configuration, and the norm to clip to where `runtime.clipping` replaces DeepSpeed's clipping.

    It does at ZeRO 1, unless DeepSpeed looks at the gradients itself or steps on the host.

    Raises:
        ValueError: gradients are to be accumulated in a dtype for which DeepSpeed has no optimizer that Muon can step under.
    """
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": spec.optimizer.grad_clip,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
        "timers": {"throughput": {"enabled": False}},  # it would wait for the GPU before every row, and nobody reads it
    } | spec.deepspeed
    zero, bf16 = config.get("zero_optimization", {}), config.get("bf16", {})
    stage = zero.get("stage", 0)
    if bf16.get("enabled"):
        # DeepSpeed looks at every gradient on its own, some 1700 launches a step; below stage 2 their norms are enough.
        config["bf16"] = {"check_grad_overflow": stage >= 2} | bf16
    accumulated = config.get("data_types", {}).get("grad_accum_dtype")
    if stage == 1 and bf16.get("enabled") and accumulated in FP32 and not zero.get("offload_optimizer"):
        raise ValueError(
            f"data_types.grad_accum_dtype: got {accumulated}, for which DeepSpeed's optimizer of bf16 parameters at ZeRO 1 keeps no flat "
            "slices; leave it out or take ZeRO 2"
        )
    if stage != 1 or zero.get("offload_optimizer") or looks_at_gradients(config):
        return config, None
    most = config["gradient_clipping"]
    return config | {"gradient_clipping": 0.0, "zero_optimization": {**zero, "compute_grad_norm": False}}, most


def looks_at_gradients(config: Mapping[str, Any]) -> bool:
    """Say whether DeepSpeed itself skips a step whose gradients are not finite, under a configuration of `deepspeed_config`."""
    bf16 = config.get("bf16", {})
    checked = bf16.get("enabled") and bf16["check_grad_overflow"]
    return bool(config.get("zero_optimization", {}).get("stage", 0) >= 2 or config.get("fp16", {}).get("enabled") or checked)
