"""A prefill's plan puts every token and entry in its place, and reads nothing back from the device that it plans for."""

from __future__ import annotations

import random

import pytest
import torch

from model.cache import FRONT, Cache, PrefillPlan
from model.layout import PackedRow
from tiny_models import V4

DRAW = random.Random(7)
LENGTHS = {
    "one token": [1],
    "edges": [128, 16, 17, 15, 127, 129, 4, 3, 8, 9, 7, 1],
    "no entries": [3, 1, 2],
    "random": [DRAW.randint(1, 300) for _ in range(9)],
}


def _planned(lengths: list[int], device: str = "cpu", dtype: torch.dtype = torch.int64) -> tuple[PrefillPlan, Cache]:
    cu = torch.tensor([0, *lengths]).cumsum(0).to(dtype)
    cache = Cache(V4, rows=len(lengths), capacity=max(lengths), device=device)
    return PrefillPlan(PackedRow(V4, cu, sum(lengths), device=torch.device(device)), cache, cu), cache


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_every_token_and_entry_has_its_place(lengths: list[int]) -> None:
    plan, cache = _planned(lengths, dtype=torch.int32)
    window, tokens = V4.sliding_window, torch.arange(sum(lengths)) + 1.0
    for layer, ratio in ((cache.layers[1], 4), (cache.layers[2], 128)):
        state = layer.compressor
        assert state is not None
        entries = torch.arange(sum(n // ratio for n in lengths)) + 0.5
        plan.put_window(layer.keys, tokens[:, None].expand(-1, layer.keys.shape[2]))
        plan.put_entries(layer.keys, entries[:, None].expand(-1, layer.keys.shape[2]), ratio, offset=FRONT + window)
        plan.keep_tail(state, *(x[:, None].expand(-1, state.kv.shape[2]) for x in (tokens, -tokens)))
        first_token = first_entry = 0
        for row, length in enumerate(lengths):
            keys, kv, ring = torch.zeros(layer.keys.shape[1]), torch.zeros(state.kv.shape[1]), state.kv.shape[1]
            for position in range(length):  # later tokens overwrite what is where they go
                keys[FRONT + position % window] = kv[position % ring] = tokens[first_token + position]
            keys[FRONT + window : FRONT + window + length // ratio] = entries[first_entry : first_entry + length // ratio]
            assert torch.equal(layer.keys[row, :, 0], keys) and torch.equal(layer.keys[row, :, -1], keys)
            assert torch.equal(state.kv[row, :, 0], kv)
            assert torch.equal(state.gate[row, :, -1], torch.where(kv > 0, -kv, float("-inf")))
            first_token, first_entry = first_token + length, first_entry + length // ratio


def test_from_the_host_nothing_is_read_back_from_the_device() -> None:
    plan, cache = _planned(LENGTHS["edges"], "meta")  # whose numbers nobody can read
    layer, total = cache.layers[1], sum(LENGTHS["edges"])
    assert layer.compressor is not None
    plan.put_window(layer.keys, layer.keys.new_zeros(total, layer.keys.shape[2]))
    plan.put_entries(
        layer.keys, layer.keys.new_zeros(sum(n // 4 for n in LENGTHS["edges"]), layer.keys.shape[2]), 4, offset=FRONT + V4.sliding_window
    )
    tail = layer.compressor.kv.new_zeros(total, layer.compressor.kv.shape[2])
    plan.keep_tail(layer.compressor, tail, tail)
