"""The compiled loops of decoding against numpy: products of any shape, exponentials, sampling, the selection of entries."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from model.config import ModelConfig
from model.kernels.decode import arithmetic, attention
from model.kernels.decode.products import map_rows, pack, padded
from model.kernels.decode.room import attention_room
from model.kernels.indexer.reference import top_entries
from runtime.generation.sampler import choose, uniforms


@pytest.mark.parametrize("outputs", [1, 15, 16, 17, 64, 130, 200])
@pytest.mark.parametrize("rows", [1, 3, 4, 15, 16, 17, 23, 40])
def test_products_equal_numpy(rows: int, outputs: int) -> None:
    random = np.random.default_rng(rows * 1000 + outputs)
    for depth in (1, 7, 64):
        x, w = (random.standard_normal((n, depth), np.float32) for n in (rows, outputs))
        y = np.full((rows, padded(outputs)), np.nan, np.float32)
        map_rows(x, pack(w), y, rows)
        np.testing.assert_allclose(y[:, :outputs], x.astype(np.float64) @ w.T, atol=1e-5 * depth**0.5)
        assert not y[:, outputs:].any()


def test_packing_keeps_stacks_apart() -> None:
    stack = np.random.default_rng(0).standard_normal((3, 20, 5), np.float32)
    np.testing.assert_array_equal(pack(stack), np.stack([pack(each) for each in stack]))


def test_exponentials_are_exact_to_rounding() -> None:
    x = np.concatenate([np.linspace(-87.3, 88, 100_001), np.linspace(-1, 1, 10_001)]).astype(np.float32)
    y = x.copy()
    arithmetic.exp_all(y)
    expected = np.exp(x.astype(np.float64))
    assert np.abs(y / expected - 1).max() < 2 * np.finfo(np.float32).eps
    edges = np.array([-np.inf, -1000, -87.4, 0, np.nan], np.float32)
    arithmetic.exp_all(edges)
    np.testing.assert_array_equal(edges, np.array([0, 0, 0, 1, np.nan], np.float32))


def test_entries_are_picked_as_the_reference_picks_them_ties_to_the_lower() -> None:
    config = ModelConfig(head_dim=16, index_topk=9, compress_ratios=[4, 0], num_hidden_layers=1)
    generator = torch.Generator().manual_seed(0)
    buffers = attention_room(config, 1, capacity=4 * 40, wide=16)
    entries = np.arange(40, dtype=np.float32)[:, None].repeat(16, 1)
    for round in range(200):
        scores = torch.randint(-3, 4, (40,), generator=generator) * (0.0 if round == 0 else -0.25)
        buffers.found[:] = scores.numpy()
        attention._pick(buffers, entries, 40, 9)
        assert buffers.picked[:, 0].tolist() == sorted(top_entries(scores[None], 9)[0].tolist())


@pytest.mark.parametrize("words", [1, 5, 128, 129, 700])
def test_tokens_are_chosen_by_their_distribution(words: int) -> None:
    generator = torch.Generator().manual_seed(words)
    logits = torch.randn(33, words, generator=generator) * 4
    draws = torch.from_numpy(uniforms(0, words, 33))
    tokens, logprobs = choose(logits, draws, 0.7)
    p = torch.softmax(logits.double() / 0.7, -1)
    above = p.cumsum(-1).gather(1, tokens[:, None])[:, 0]
    assert (above > draws - 1e-6).all() and (above - p.gather(1, tokens[:, None])[:, 0] <= draws + 1e-6).all()
    torch.testing.assert_close(logprobs.double(), p.log().gather(1, tokens[:, None])[:, 0], atol=1e-5, rtol=0)
    best, logprobs = choose(logits, None, 0.7)
    assert torch.equal(best, logits.argmax(-1))
    torch.testing.assert_close(logprobs, torch.log_softmax(logits, -1).amax(-1), atol=1e-5, rtol=0)


def test_a_token_of_no_probability_is_never_drawn() -> None:
    logits = torch.full((3, 300), -1e30)
    logits[:, [3, 150]] = 0
    draws = torch.tensor([0.0, 0.5, float(np.nextafter(np.float32(1), np.float32(0)))])
    assert choose(logits, draws, 1.0)[0].tolist() == [3, 150, 150]


@pytest.mark.slow
def test_a_machine_without_a_writable_place_compiles_for_itself(tmp_path) -> None:
    file = tmp_path / "file"
    file.touch()
    program = (
        "import numpy as np; from model.kernels.decode import compiled, arithmetic; x = np.zeros(3, np.float32); arithmetic.exp_all(x);"
        " print(compiled._PLACE, x.tolist())"
    )
    environment = {"NUMBA_CACHE_DIR": str(file), "XDG_CACHE_HOME": str(file), "PATH": ""}
    out = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True).stdout
    assert out.split(maxsplit=1) == ["None", "[1.0, 1.0, 1.0]\n"]
