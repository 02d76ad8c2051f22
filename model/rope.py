"""Rotary positions with YaRN: on the last dimensions of a head in adjacent pairs, or on the first ones in halves."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.config import AnyConfig, RopeScaling
from model.kernels.choice import implementation_for
from model.transfer import send


def inverse_frequencies(config: AnyConfig, *, compressed: bool) -> Tensor:
    """Return the angular frequencies of the rotated pairs of one kind of layer.

    Args:
        config: gives the bases and the YaRN numbers.
        compressed: True for layers with a compressor (CSA, HCA), False for sliding-window layers and MTP; V3.2 has one kind only.

    Returns:
        [R / 2] fp32, radians a position, R = `qk_rope_head_dim`.
    """
    base, scaling = config.rope(compressed=compressed)
    return yarn_frequencies(config.qk_rope_head_dim, base, scaling)


def yarn_frequencies(width: int, base: float, scaling: RopeScaling | None) -> Tensor:
    """Return f_i = base^(-2i/width), slowed down by the YaRN ramp between `beta_fast` and `beta_slow` turns where there is a scaling.

    Args:
        width: rotated dimensions R.
        base: theta.
        scaling: the ramp's numbers; None for plain rotary positions.

    Returns:
        [R / 2] fp32, radians a position.

    Source: released inference code, `precompute_freqs_cis`; YaRN paper eq. 17-23 without the attention temperature.
    """
    exponents = torch.arange(0, width, 2, dtype=torch.float32, device="cpu") / width
    frequencies = 1.0 / base**exponents
    if scaling is None or scaling.factor == 1.0:
        return frequencies
    context = scaling.original_max_position_embeddings

    def pair_that_turns(turns: float) -> float:
        return width * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(pair_that_turns(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(scaling.beta_slow)), width - 1)
    ramp = ((torch.arange(width // 2, dtype=torch.float32, device="cpu") - low) / max(high - low, 0.001)).clamp(0, 1)
    return frequencies / scaling.factor * ramp + frequencies * (1 - ramp)


def rotations(positions: Tensor, frequencies: Tensor) -> Tensor:
    """Return the unit complex numbers that rotate each pair at each position: [..., R / 2] complex64."""
    angles = positions.float().unsqueeze(-1) * send(frequencies, positions.device)
    return torch.polar(torch.ones_like(angles), angles)


def rotate(x: Tensor, turns: Tensor, *, inverse: bool = False) -> Tensor:
    """Rotate the last 2R' dimensions of `x` pairwise, leaving the others as they are.

    Args:
        x: [..., K] any float dtype; pairs are adjacent, (2i, 2i + 1).
        turns: [..., R'] complex, as many dimensions as `x`, 1 in all but the first and the last.
        inverse: turn backwards.

    Returns:
        [..., K] a new tensor in the dtype of `x`; the rotation itself in fp32.
    """
    if implementation_for(x) == "triton":
        from model.kernels.rotary_norm import fused  # brings Triton, which a CPU does without

        return fused.rotate(x, turns, inverse=inverse)
    turns = turns.conj().resolve_conj() if inverse else turns
    return _Rotate.apply(x, turns) if torch.is_grad_enabled() else _rotated(x, turns)


def rotate_halves(x: Tensor, turns: Tensor) -> Tensor:
    """Rotate the first 2R' dimensions of `x`, where dimension i pairs with i + R', leaving the others as they are.

    Args:
        x: [..., K] any float dtype.
        turns: [..., R'] complex, broadcast against the leading dimensions of `x`.

    Returns:
        [..., K] a new tensor in the dtype of `x`; the rotation itself in fp32.

    Source: released V3.2 inference code, `Indexer`: unlike the attention's, its rotation is not interleaved and comes first.
    """
    half = turns.shape[-1]
    low, high, rest = x.split([half, half, x.shape[-1] - 2 * half], -1)
    wide_low, wide_high, cos, sin = low.float(), high.float(), turns.real, turns.imag
    turned = torch.cat([wide_low * cos - wide_high * sin, wide_low * sin + wide_high * cos], -1)
    return torch.cat([turned.to(x.dtype), rest], -1)


def _rotated(x: Tensor, turns: Tensor) -> Tensor:
    width = 2 * turns.shape[-1]
    out = x.clone(memory_format=torch.contiguous_format)
    tail = out[..., -width:]
    if x.dtype in (torch.float32, torch.float64) and width % 2 == 0 and x.shape[-1] % 2 == 0:
        torch.view_as_complex(tail.unflatten(-1, (width // 2, 2))).mul_(turns)
    else:
        pairs = torch.view_as_complex(tail.float().unflatten(-1, (width // 2, 2)).contiguous())
        tail.copy_(torch.view_as_real(pairs * turns).flatten(-2))
    return out


class _Rotate(torch.autograd.Function):
    """Copy and rotate in place; the gradient is the inverse rotation."""

    @staticmethod
    def forward(ctx, x: Tensor, turns: Tensor) -> Tensor:
        ctx.save_for_backward(turns)
        return _rotated(x, turns)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (turns,) = ctx.saved_tensors
        return _rotated(grad, turns.conj().resolve_conj()), None
