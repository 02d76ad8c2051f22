"""The model's side of speculative decoding: the MTP block drafts a token, one pass over two tokens a row judges it.

A row's newest token is not in the cache yet; it goes in together with the draft behind it. Whoever decides how many of the two stay lowers
`Cache.positions` to that: every part of the cache is stored by position, so what was taken back is overwritten before it is read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.cache import Cache, PrefillPlan, Step, Steps, layer_cache
from model.layout import PackedRow
from model.transformer import Transformer


@torch.no_grad()
def prefill(model: Transformer, tokens: Tensor, cu_seqlens: Tensor, cache: Cache) -> Tensor:
    """Do what `Transformer.prefill` does, for the MTP block too.

    Returns:
        [N, D] hidden state of each last token, what the head reads.

    Raises:
        ValueError: the model has no MTP block; or as `Transformer.prefill`.
    """
    if not len(model.mtp):
        raise ValueError("speculative decoding: the model has no MTP block (num_nextn_predict_layers = 0) to draft with")
    row = PackedRow(model.config, cu_seqlens, len(tokens), device=tokens.device)
    plan = PrefillPlan(row, cache, cu_seqlens)
    streams, _ = model.streams(tokens, row, cache, plan)
    keys = cache.layers[0].keys
    cache.draft = layer_cache(model.config, 0, rows=cache.rows, capacity=cache.capacity, device=keys.device, dtype=keys.dtype)
    following = tokens.roll(-1)  # wrong for each last token, whose place in the draft's cache is overwritten once its successor is known
    model.mtp[0](streams, model.embed(following), following, row, cache.draft, plan)
    cache.positions.copy_(row.lengths)
    newest = streams.index_select(0, row.cu_seqlens[1:] - 1)
    cache.streams = newest.unsqueeze(0)
    return model.last(newest)


@torch.no_grad()
def judge(model: Transformer, tokens: Tensor, cache: Cache) -> Tensor:
    """Pass the newest n tokens of every row, of which the first is certain; positions move on by n.

    Args:
        model: the model.
        tokens: [n, B] int64.
        cache: as `prefill` left it.

    Returns:
        [n, B, D] hidden states, what the head reads.

    Raises:
        ValueError: a row is full.
    """
    count, rows = tokens.shape
    steps = Steps([Step(model.config, cache.positions + i) for i in range(count)])
    if steps.parts[-1].longest > cache.capacity:
        raise ValueError(f"decode: got a row of {steps.parts[-1].longest} tokens, expected at most the capacity {cache.capacity}")
    streams = model.decode_streams(tokens.flatten(), steps, cache)
    cache.positions += count
    cache.streams = streams.unflatten(0, (count, rows))
    return model.last(streams).unflatten(0, (count, rows))


@torch.no_grad()
def draft(model: Transformer, following: Tensor, positions: Tensor, cache: Cache) -> Tensor:
    """Let the MTP block read the newest tokens and predict what comes after their successors.

    Args:
        model: the model.
        following: [n, B] int64, the successor of each of the n tokens whose streams the cache holds.
        positions: [B] int64 of the first of them.
        cache: holds their streams.

    Returns:
        [n, B, D] hidden states; through the head they predict the token after each successor.
    """
    assert cache.draft is not None and cache.streams is not None
    count, rows = following.shape
    steps = Steps([Step(model.config, positions + i) for i in range(count)])
    successors = following.flatten()
    hidden = model.mtp[0].draft(cache.streams[:count].flatten(0, 1), model.embed(successors), successors, steps, cache.draft)  # type: ignore[operator]
    return hidden.unflatten(0, (count, rows))
