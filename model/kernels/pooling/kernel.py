"""Softmax-weighted means over the tokens of compressed entries, channel by channel, and the gradients. Arithmetic in fp32.

The tokens of an entry are numbered from 0. With OVERLAP the first RATIO are those of the entry before, of which the first K channels
count, and the others its own, of which the last K do; a sample's first entry has only its own.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _where(entry, number, columns, first, width, RATIO: tl.constexpr, OVERLAP: tl.constexpr):
    """Find tokens of an entry: their places in the list of all entries' tokens, their channels, and which of them count."""
    token, channel = entry * RATIO + number, columns[None, :]
    live = number < RATIO
    if OVERLAP:
        token -= RATIO
        channel = tl.where(number < RATIO, 0, width)[:, None] + columns[None, :]
        live = (number < 2 * RATIO) & (number >= RATIO * tl.load(first + entry).to(tl.int32))
    return token, channel, live


@triton.jit
def _gates(gate, ape, place, number, channel, mask, stride, channels, RATIO: tl.constexpr):
    """Load gates of tokens with their places' biases; -inf outside the mask."""
    bias = tl.load(ape + (number % RATIO)[:, None] * channels + channel, mask, 0.0).to(tl.float32)
    return tl.load(gate + place[:, None] * stride + channel, mask, float("-inf")).to(tl.float32) + bias


@triton.jit
def pool(kv, gate, ape, places, first, out, lse, width, kv_stride, gate_stride, channels, RATIO: tl.constexpr, OVERLAP: tl.constexpr,
         TOKENS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """out = sum_j softmax_j(gate_j + ape_j) kv_j and the softmax's log-sum-exp, [C, K] fp32; one program an entry and its channels."""
    entry = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    most, below, total = tl.full([BLOCK], -1e30, tl.float32), tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(0, 2 * RATIO if OVERLAP else RATIO, TOKENS):
        number = start + tl.arange(0, TOKENS)
        token, channel, live = _where(entry, number, columns, first, width, RATIO, OVERLAP)
        mask = live[:, None] & inside[None, :]
        place = tl.load(places + token, live, 0)
        g = _gates(gate, ape, place, number, channel, mask, gate_stride, channels, RATIO)
        v = tl.load(kv + place[:, None] * kv_stride + channel, mask, 0.0).to(tl.float32)
        highest = tl.maximum(most, tl.max(g, 0))
        keep, weights = tl.exp(most - highest), tl.exp(g - highest[None, :])
        below, total, most = below * keep + tl.sum(weights, 0), total * keep + tl.sum(weights * v, 0), highest
    at = entry.to(tl.int64) * width + columns
    tl.store(out + at, total / below, inside)
    tl.store(lse + at, most + tl.log(below), inside)


@triton.jit
def pool_backward(grad, out, lse, kv, gate, ape, places, first, dkv, dgate, dape, entries, width, group, kv_stride, gate_stride, channels,
                  SHARED: tl.constexpr, RATIO: tl.constexpr, OVERLAP: tl.constexpr, TOKENS: tl.constexpr,
                  BLOCK: tl.constexpr):  # fmt: skip
    """Gradients of `pool`: of the tokens that count, in their rows or, with SHARED, in those of the list of all entries' tokens.

    A program takes some tokens of a group of entries and leaves its share of the gradient of `ape` in dape [groups, c * RATIO, K].
    """
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    number = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    total = tl.zeros([TOKENS, BLOCK], tl.float32)
    first_entry = tl.program_id(0) * group
    for entry in range(first_entry, tl.minimum(first_entry + group, entries)):
        token, channel, live = _where(entry, number, columns, first, width, RATIO, OVERLAP)
        mask = live[:, None] & inside[None, :]
        place = tl.load(places + token, live, 0)
        at = tl.cast(entry, tl.int64) * width + columns
        d, mean = tl.load(grad + at, inside, 0.0), tl.load(out + at, inside, 0.0)
        g = _gates(gate, ape, place, number, channel, mask, gate_stride, channels, RATIO)
        v = tl.load(kv + place[:, None] * kv_stride + channel, mask, 0.0).to(tl.float32)
        dv = tl.exp(g - tl.load(lse + at, inside, 0.0)[None, :]) * d[None, :]
        dg = dv * (v - mean[None, :])
        total += dg
        if SHARED:
            place = tl.cast(token, tl.int64)
        to = place[:, None] * channels + channel
        tl.store(dkv + to, dv.to(dkv.dtype.element_ty), mask)
        tl.store(dgate + to, dg.to(dgate.dtype.element_ty), mask)
    rows = tl.program_id(0).to(tl.int64) * (2 * RATIO if OVERLAP else RATIO) + number
    real = number < (2 * RATIO if OVERLAP else RATIO)
    tl.store(dape + rows[:, None] * width + columns[None, :], total, real[:, None] & inside[None, :])
