"""The hyper-connections of a decoding step: the same arithmetic as `model.kernels.hyper_connections`, 16 rows side by side."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from model.kernels.decode.arithmetic import ONE, ZERO, copy, exp_all, inverse_rms, normalise, sigmoid, sigmoid_all
from model.kernels.decode.compiled import compiled
from model.kernels.decode.products import LANES, at, product

_TWO = np.float32(2)
_LOOK, _SETTLED = 8, np.float32(2 * np.finfo(np.float32).eps)
"""As in `model.kernels.sinkhorn.op.normalise`."""


class Mixing(NamedTuple):
    """What takes the streams into a sub-layer: packed `fn`, `base` [2M + M^2], `scale` [3], the sub-layer's norm [D]."""

    fn: Any
    base: Any
    scale: Any
    norm: Any


class Streams(NamedTuple):
    """Buffers of a step.

    Attributes:
        now, then: [B, M, D] the streams before and after a sub-layer.
        mix: [B, padded 2M + M^2].
        lanes: [2M + M^2 + M, 16], 16 rows' numbers side by side.
        x: [B, D] normalised input of the sub-layer.
        post: [B, M], comb: [B, M, M].
    """

    now: Any
    then: Any
    mix: Any
    lanes: Any
    x: Any
    post: Any
    comb: Any


class Numbers(NamedTuple):
    """Sinkhorn iterations, and the epsilons of the hyper-connections and of the norms (fp32)."""

    iterations: int
    hc_eps: Any
    norm_eps: Any


@compiled()
def enter(streams, mixing, numbers, count):
    """Collapse the streams of the first `count` rows into `x`, `post` and `comb`; see `hyper_connections.op.mix_in`."""
    _, copies, width = streams.now.shape
    product((at(streams.now, 0), copies * width), mixing.fn, (at(streams.mix, 0), streams.mix.shape[1]), count)
    for first in range(0, count, LANES):
        lanes = min(LANES, count - first)
        _gather(streams, mixing, numbers, first, lanes)
        sigmoid_all(streams.lanes[: 2 * copies].reshape(2 * copies * LANES))
        _doubly_stochastic(streams.lanes, copies, numbers)
        _scatter(streams, numbers, mixing.norm, first, lanes)


@compiled()
def _gather(streams, mixing, numbers, first, lanes):
    """Scale and shift the mixes of up to 16 rows into columns."""
    _, copies, width = streams.now.shape
    scale, base = mixing.scale, mixing.base
    for lane in range(lanes):
        inverse = inverse_rms(streams.now[first + lane].reshape(copies * width), numbers.norm_eps)
        mix = streams.mix[first + lane]
        for i in range(len(base)):
            part = 0 if i < copies else 1 if i < 2 * copies else 2
            streams.lanes[i, lane] = mix[i] * inverse * scale[part] + base[i]


@compiled()
def _doubly_stochastic(lanes, copies, numbers):
    """Turn rows 2M .. 2M + M^2 of `lanes` into Sinkhorn's matrices, j first; the last M rows are for sums."""
    begin, sums = 2 * copies, lanes[2 * copies + copies * copies :]
    matrix = lanes[begin : begin + copies * copies]
    for j in range(copies):
        row = matrix[j * copies : (j + 1) * copies]
        for l in range(LANES):
            sums[j, l] = row[0, l]
        for k in range(1, copies):
            for l in range(LANES):
                sums[j, l] = max(sums[j, l], row[k, l])
        for k in range(copies):
            for l in range(LANES):
                row[k, l] -= sums[j, l]
    exp_all(matrix.reshape(matrix.size))
    for j in range(copies):
        _divide_by_sums(matrix[j * copies : (j + 1) * copies], (0, copies, 1), sums[j], ZERO)
    for i in range(len(matrix)):
        for l in range(LANES):
            matrix[i, l] += numbers.hc_eps
    for step in range(2 * numbers.iterations - 1):
        along, across = (copies, 1) if step % 2 == 0 else (1, copies)
        for i in range(copies):
            _divide_by_sums(matrix, (i * across, copies, along), sums[i], numbers.hc_eps)
        if step % _LOOK == _LOOK - 1 and _settled(sums, copies):
            break


@compiled()
def _settled(inverse, copies):
    """Tell whether the last step divided by 1, to two units in the last place, so that the rest would change nothing.

    All rows go on until the slowest has settled, so that the last bit of a row may, seldom, depend on the rows beside it.
    """
    furthest = ZERO
    for i in range(copies):
        for l in range(LANES):
            furthest = max(furthest, abs(inverse[i, l] - ONE))
    return furthest < _SETTLED


@compiled()
def _divide_by_sums(matrix, line, total, eps):
    """Divide the rows first, first + step, ... of `matrix` by their sum + eps, column by column; line = (first, count, step)."""
    first, count, step = line
    for l in range(LANES):
        total[l] = eps
    for j in range(count):
        for l in range(LANES):
            total[l] += matrix[first + j * step, l]
    for l in range(LANES):
        total[l] = ONE / total[l]
    for j in range(count):
        for l in range(LANES):
            matrix[first + j * step, l] *= total[l]


@compiled()
def _scatter(streams, numbers, norm, first, lanes):
    """Write `post` and `comb` of up to 16 rows, sum their streams and normalise the sum."""
    copies = streams.now.shape[1]
    for lane in range(lanes):
        b = first + lane
        x, now = streams.x[b], streams.now[b]
        for j in range(copies):
            before = streams.lanes[j, lane] + numbers.hc_eps
            streams.post[b, j] = _TWO * streams.lanes[copies + j, lane]
            for k in range(copies):
                streams.comb[b, j, k] = streams.lanes[2 * copies + j * copies + k, lane]
            _accumulate(x, now[j], before, j == 0)
        normalise(x, norm, numbers.norm_eps, x)


@compiled()
def _accumulate(total, x, weight, anew):
    if anew:
        for d in range(len(total)):
            total[d] = weight * x[d]
    else:
        for d in range(len(total)):
            total[d] += weight * x[d]


@compiled()
def leave(streams, output, count):
    """Put a sub-layer's output [B, >= D] into the streams, from `now` to `then`; see `hyper_connections.op.mix_out`."""
    _, copies, width = streams.now.shape
    for b in range(count):
        for k in range(copies):
            then = streams.then[b, k]
            _accumulate(then, output[b, :width], streams.post[b, k], True)
            for j in range(copies):
                _accumulate(then, streams.now[b, j], streams.comb[b, j, k], False)


@compiled()
def embed(table, tokens, streams):
    """Repeat the embedding [V, D] of each token on every stream."""
    for b in range(len(tokens)):
        for k in range(streams.now.shape[1]):
            copy(table[tokens[b]], streams.now[b, k])


@compiled()
def merge(streams, mixing, numbers, count):
    """Collapse the streams after the last block into `x`, normalised; `fn` gives M weights, see `hyper_connections.merge`."""
    _, copies, width = streams.now.shape
    product((at(streams.now, 0), copies * width), mixing.fn, (at(streams.mix, 0), streams.mix.shape[1]), count)
    for b in range(count):
        inverse = inverse_rms(streams.now[b].reshape(copies * width), numbers.norm_eps)
        for j in range(copies):
            weight = sigmoid(streams.mix[b, j] * inverse * mixing.scale[0] + mixing.base[j]) + numbers.hc_eps
            _accumulate(streams.x[b], streams.now[b, j], weight, j == 0)
        normalise(streams.x[b], mixing.norm, numbers.norm_eps, streams.x[b])
