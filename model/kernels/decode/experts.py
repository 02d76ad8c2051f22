"""Mixture of experts of a decoding step: routing, rows laid out by expert, the shared expert as one more that every row passes."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from model.kernels.decode.arithmetic import ZERO, copy, exp, sigmoid
from model.kernels.decode.compiled import compiled
from model.kernels.decode.products import at, product

_TWENTY, _TINY = np.float32(20), np.float32(1e-20)


class ExpertWeights(NamedTuple):
    """Packed weights of the gate, of w1 over w3 and of w2, the shared expert last [E + 1, ...]; how the gate chooses.

    Attributes:
        bias: [E] of a scored layer; table: [V, A] int64 of a hash layer, else with no rows.
    """

    gate: Any
    w13: Any
    w2: Any
    bias: Any
    table: Any


class ExpertBuffers(NamedTuple):
    """Room for a step; n = B * (A + 1) pairs of a row and an expert.

    Attributes:
        scores: [B, padded E].
        chosen: [B, A] int64, shares: [B, A] fp32, place: [B, A] int64 a pair's row in the buffers below.
        ends: [E + 2] int64, rows before each expert's.
        x: [n, D], hidden: [n, padded 2F], inner: [n, F], y: [n, padded D].
    """

    scores: Any
    chosen: Any
    shares: Any
    place: Any
    ends: Any
    x: Any
    hidden: Any
    inner: Any
    y: Any


@compiled()
def moe(x, weights, buffers, rows, how):
    """Pass `x` [B, D] through its experts; the result is in `out`.

    Args:
        x: normalised input.
        weights: `ExpertWeights`.
        buffers: (`ExpertBuffers`, out [B, padded D]).
        rows: `Rows`, their tokens choose in a hash layer.
        how: (clamp of the two branches, scaling of the shares, whether they are normalised), fp32, fp32, bool.
    """
    own, out = buffers
    limit, scaling, normalises = how
    count = len(rows.tokens)
    product((at(x, 0), x.shape[1]), weights.gate, (at(own.scores, 0), own.scores.shape[1]), count)
    for b in range(count):
        _route(own, weights, b, rows.tokens[b])
        total = _TINY if normalises else scaling
        if normalises:
            for a in range(own.chosen.shape[1]):
                total += own.shares[b, a]
        for a in range(own.chosen.shape[1]):
            own.shares[b, a] = own.shares[b, a] / total * scaling if normalises else own.shares[b, a] * scaling
    _group(x, own, len(weights.w2) - 1, count)
    for e in range(len(weights.w2)):
        first, size = own.ends[e], own.ends[e + 1] - own.ends[e]
        _expert(weights.w13[e], weights.w2[e], own, (first, size), limit)
    for b in range(count):
        _sum(own, out[b, : x.shape[1]], b, own.ends[len(weights.w2) - 1] + b)


@compiled()
def _route(buffers, weights, b, token):
    """Choose the experts of one row, the highest sqrt(softplus) + bias, ties to the lower; their scores are the shares."""
    scores, chosen, shares = buffers.scores[b], buffers.chosen[b], buffers.shares[b]
    experts = len(weights.bias)
    for e in range(experts):
        s = scores[e]
        scores[e] = np.sqrt(s if s > _TWENTY else np.float32(np.log1p(exp(s))))
    for a in range(len(chosen)):
        best = np.int64(-1)
        if len(weights.table):
            best = weights.table[token, a]
        else:
            for e in range(experts):
                taken = False
                for other in range(a):
                    taken |= chosen[other] == e
                if not taken and (best < 0 or scores[e] + weights.bias[e] > scores[best] + weights.bias[best]):
                    best = np.int64(e)
        chosen[a], shares[a] = best, scores[best]


@compiled()
def _group(x, buffers, experts, count):
    """Lay the rows out by expert, then all once more for the shared one."""
    chosen, ends = buffers.chosen, buffers.ends
    active = chosen.shape[1]
    ends[:] = 0
    for b in range(count):
        for a in range(active):
            ends[chosen[b, a] + 2] += 1
    for e in range(experts):  # ends[e + 1] is now where expert e begins, and moves to its end as its rows come
        ends[e + 2] += ends[e + 1]
    for b in range(count):
        for a in range(active):
            place = ends[chosen[b, a] + 1]
            ends[chosen[b, a] + 1] += 1
            buffers.place[b, a] = place
            copy(x[b], buffers.x[place])
        copy(x[b], buffers.x[count * active + b])
    ends[experts + 1] = count * (active + 1)


@compiled()
def _expert(w13, w2, buffers, span, limit):
    """Pass one expert's rows: w2 (silu(min(w1 x, l)) * clamp(w3 x, -l, l))."""
    first, size = span
    x, hidden, inner, y = buffers.x, buffers.hidden, buffers.inner, buffers.y
    width, wide = inner.shape[1], hidden.shape[1]
    product((at(x, first * x.shape[1]), x.shape[1]), w13, (at(hidden, first * wide), wide), size)
    for row in range(first, first + size):
        _activate(hidden[row], inner[row], limit)
    product((at(inner, first * width), width), w2, (at(y, first * y.shape[1]), y.shape[1]), size)


@compiled()
def _activate(both, result, limit):
    """Clamp and gate one row: silu(min(gate, l)) * clamp(up, -l, l), the gates before the ups."""
    width = len(result)
    for f in range(width):
        gate, up = both[f], both[width + f]
        gate = limit if gate > limit else gate
        up = limit if up > limit else (-limit if up < -limit else up)
        result[f] = gate * sigmoid(gate) * up


@compiled()
def _sum(buffers, out, b, shared):
    """Add up one row's experts by their shares, and the shared one."""
    for d in range(len(out)):
        out[d] = ZERO
    for a in range(buffers.chosen.shape[1]):
        y, share = buffers.y[buffers.place[b, a]], buffers.shares[b, a]
        for d in range(len(out)):
            out[d] += share * y[d]
    y = buffers.y[shared]
    for d in range(len(out)):
        out[d] += y[d]
