"""Which implementation the kernels run with: Triton on a GPU, plain torch elsewhere, unless the configuration names one."""

from __future__ import annotations

from torch import Tensor

IMPLEMENTATIONS = ("triton", "reference")

_chosen: str | None = None


def choose(implementation: str | None) -> None:
    """Make every kernel of this process run as named.

    Args:
        implementation: one of `IMPLEMENTATIONS`, or None for Triton on a GPU and plain torch elsewhere.

    Raises:
        ValueError: there is no such implementation.
    """
    global _chosen
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(f"kernels: got {implementation!r}, expected one of {', '.join(IMPLEMENTATIONS)}")
    _chosen = implementation


def implementation_for(x: Tensor) -> str:
    """Name the implementation that a kernel given `x` runs with."""
    return _chosen or ("triton" if x.is_cuda else "reference")
