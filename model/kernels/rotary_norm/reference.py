"""The definition of the fused normalisation and rotation, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def normalise(x: Tensor, weight: Tensor | None, turns: Tensor | None, eps: float) -> Tensor:
    """Compute `fused.normalise`; the arguments are the same."""
    out = x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        out = out * weight.double()
    return out.to(x.dtype) if turns is None else rotate(out, turns).to(x.dtype)


def rotate(x: Tensor, turns: Tensor, *, inverse: bool = False) -> Tensor:
    """Compute `fused.rotate`; the arguments are the same."""
    width = 2 * turns.shape[-1]
    rest, tail = x.double().split([x.shape[-1] - width, width], -1)
    pairs = torch.view_as_complex(tail.unflatten(-1, (width // 2, 2)).contiguous())
    turned = torch.view_as_real(pairs * (turns.conj() if inverse else turns)).flatten(-2)
    return torch.cat([rest, turned], -1).to(x.dtype)
