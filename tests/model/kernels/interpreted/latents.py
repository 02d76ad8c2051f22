"""What a token of V3.2 leaves in the cache in decoding, and its index queries, against the model's own norms and rotations."""

import pytest
import torch

from model.kernels.choice import choose
from model.kernels.indexer.tokens import put_key, turn_queries
from model.kernels.sparse_attention.listed import put_latent
from model.kernels.static_decode.rows import Rows
from model.norm import LayerNorm, RMSNorm
from model.rope import rotate, rotate_halves, rotations

POSITIONS = torch.tensor([0, 6, 3])
FREQUENCIES = torch.tensor([1.0, 0.3, 0.1, 0.03])
ROWS = Rows(POSITIONS, torch.view_as_real(rotations(torch.arange(9), FREQUENCIES)), 1e-5)
TURNS = rotations(POSITIONS, FREQUENCIES)


@pytest.fixture(autouse=True)
def reference():
    """Compute what is expected in plain torch."""
    choose("reference")


def test_latent_key():
    x, keys, norm = torch.randn(3, 50)[:, 7:31], torch.full((3, 11, 24), -7.0), RMSNorm(16, 1e-5)
    norm.weight.data.normal_()
    expected = keys.clone()
    expected[torch.arange(3), 1 + POSITIONS] = rotate(torch.cat([norm(x[:, :16]), x[:, 16:]], 1), TURNS).detach()
    put_latent(x, norm, keys, ROWS, front=1)
    torch.testing.assert_close(keys, expected, atol=1e-5, rtol=1e-5)


def test_index_key():
    x, keys, norm = torch.randn(3, 50)[:, 7:23], torch.full((3, 9, 16), -7.0), LayerNorm(16, eps=1e-6)
    norm.weight.data.normal_()
    norm.bias.data.normal_()
    expected = keys.clone()
    expected[torch.arange(3), POSITIONS] = rotate_halves(norm(x), TURNS).detach()
    put_key(x, norm, keys, ROWS)
    torch.testing.assert_close(keys, expected, atol=1e-5, rtol=1e-5)


def test_index_queries():
    q = torch.randn(3, 5, 16)
    torch.testing.assert_close(turn_queries(q, ROWS), rotate_halves(q, TURNS.unsqueeze(1)), atol=1e-5, rtol=1e-5)
