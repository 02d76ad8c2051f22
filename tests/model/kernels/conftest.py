"""What every test of a kernel begins with."""

import pytest
import torch

from model.kernels.choice import choose


@pytest.fixture(autouse=True)
def seeded_and_nan_filled():
    """Seed, and fill new memory with NaN, so that an element that no kernel writes is seen; torch's own sums are deterministic."""
    torch.manual_seed(0)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    choose(None)
