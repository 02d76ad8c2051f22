"""Orthogonalise many matrices at once: which implementation runs."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from model.kernels.choice import implementation_for
from model.kernels.newton_schulz import reference


def orthogonalize(matrices: Tensor) -> Tensor:
    """Replace each matrix by the nearest semi-orthogonal one, up to the hybrid Newton-Schulz iteration's accuracy.

    On a GPU the iteration runs on Gram matrices in fp16 with fp32 sums, see `gram`.

    Args:
        matrices: [..., N, M] float; a batch is iterated together.

    Returns:
        same shape and dtype; singular values within about 1 +- 0.05.

    Source: DeepSeek-V4 report, section 2.4 (X <- aX + b(XX^T)X + c(XX^T)^2 X on X / ||X||_F).
    """
    if implementation_for(matrices) == "reference":
        return reference.orthogonalize(matrices)
    from model.kernels.newton_schulz import gram  # brings Triton, which a CPU does without

    return gram.orthogonalize(matrices)


def orthogonalize_(matrices: Sequence[Tensor], rms: float) -> None:
    """Replace matrices by what `orthogonalize` makes of each, times rms sqrt(max(N, M)): its root mean square is then `rms`.

    On a GPU no copy in their dtype is made: what is iterated is in fp16 and bounded, see `gram`.

    Args:
        matrices: [..., N, M] of any shapes, at least one, of one float dtype, contiguous, each overwritten.
        rms: without a unit.
    """
    if implementation_for(matrices[0]) == "reference":
        reference.orthogonalize_(matrices, rms)
        return
    from model.kernels.newton_schulz import gram  # brings Triton, which a CPU does without

    gram.orthogonalize_(matrices, rms)
