"""Process-wide settings that make a CPU fast without changing what is computed."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_TOLERANCE = 1e-6
"""Relative error of an honest fp32 product of the size probed; a product through bf16 is off by 1e-3."""


def prefer_onednn() -> bool:
    """Send this process's fp32 matrix products through oneDNN where that changes nothing but the speed.

    torch multiplies fp32 matrices with MKL unless a lower internal precision is allowed; on processors where MKL takes a slow path
    oneDNN is twice as fast. Where the processor has no matrix unit for the lower precision, oneDNN computes in full fp32; a probe makes
    sure of that, and the setting is undone where it does not hold.

    Returns:
        Whether oneDNN is used from now on.
    """
    if not torch.backends.mkldnn.is_available():
        return False
    setting = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = setting.fp32_precision
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(256, 512, generator=generator), torch.randn(512, 256, generator=generator)
    exact = a.double() @ b.double()
    setting.fp32_precision = "bf16"
    honest = all(
        float((f(a, b).double() - exact).norm() / exact.norm()) < _TOLERANCE
        for f in (torch.mm, lambda x, y: torch.bmm(x[None], y[None])[0])
    )
    if not honest:
        setting.fp32_precision = before
    return honest


@contextmanager
def small_products() -> Iterator[None]:
    """Multiply batches of tiny matrices without oneDNN, whose set-up costs more than the arithmetic; undoes nothing else."""
    setting = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = setting.fp32_precision
    setting.fp32_precision = "ieee"
    try:
        yield
    finally:
        setting.fp32_precision = before


_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
"""Numbers of glibc's `mallopt`, malloc.h."""


def keep_freed_memory() -> bool:
    """Make the C library keep freed memory instead of returning it, so that large tensors do not fault their pages in again each time.

    Costs no more than the peak that the process reaches anyway.

    Returns:
        Whether the C library took the settings; only glibc knows them.
    """
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt"):
        return False
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 64 << 20))
    return all(library.mallopt(ctypes.c_int(name), ctypes.c_int(value)) for name, value in settings)
