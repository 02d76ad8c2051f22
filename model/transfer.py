"""Copies from the host to a device that wait for nothing."""

from __future__ import annotations

import torch
from torch import Tensor


def send(x: Tensor, device: torch.device) -> Tensor:
    """Put a tensor on a device; from the host to a GPU behind what is already queued there, without waiting for it.

    Args:
        x: any tensor; one on the host must not be written to until the copy was made, and nothing here does.
        device: where to; `x` itself is returned where it is there already.
    """
    if x.device.type == "cpu" and device.type == "cuda":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)
