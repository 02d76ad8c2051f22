"""The process-wide CPU settings change the speed and nothing else."""

from __future__ import annotations

import subprocess
import sys

PROBE = """
import torch
from model.cpu import keep_freed_memory, prefer_onednn, small_products
a, b = torch.randn(300, 200), torch.randn(200, 100)
before, exact = a @ b, a.double() @ b.double()
used = prefer_onednn()
inside = None
with small_products():
    inside = torch.backends.mkldnn.matmul.fp32_precision
after = torch.backends.mkldnn.matmul.fp32_precision
assert (after == "bf16") == used and (not used or inside == "ieee"), (used, inside, after)
assert float(((a @ b).double() - exact).norm() / exact.norm()) < 1e-6
assert isinstance(keep_freed_memory(), bool)
assert float((torch.ones(3 << 20).sum())) == 3 << 20
"""


def test_settings_keep_fp32_products_exact() -> None:
    subprocess.run([sys.executable, "-c", PROBE], check=True, timeout=60)
