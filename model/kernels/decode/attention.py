"""Attention of a decoding step: projections, compressed entries as their blocks fill up, and each row against its own keys."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from model.cache import FRONT
from model.kernels.decode.arithmetic import ONE, ZERO, bits_of, copy, exp, inverse_rms, normalise, rotate
from model.kernels.decode.compiled import compiled
from model.kernels.decode.products import LANES, at, multiply, product

_NONE = np.float32(-np.inf)


class Projections(NamedTuple):
    """Packed weights: `wide` D -> latent | kv | whatever else reads the input, wq_b, wo_a [G, ...], wo_b; norms [R], [K]; sink [H]."""

    wide: Any
    wq_b: Any
    wo_a: Any
    wo_b: Any
    q_norm: Any
    kv_norm: Any
    sink: Any


class Rows(NamedTuple):
    """The rows of a step: their place in the cache, their position, the token they take, each [B] int64."""

    slots: Any
    positions: Any
    tokens: Any


class Buffers(NamedTuple):
    """Room for a step.

    Attributes:
        wide: [B, padded widths of all input projections].
        latent: [B, R].
        q: [B, padded H * K], index_q: [B, padded H' * K'].
        flat: [max(K, K'), 16] queries of one row, transposed.
        scores: [keys, 16], highest, totals: [16] their maxima and the sums of their exponentials, weights: [16, padded keys].
        pool: [2, max(K, K')] maxima and sums of a compressor's gates.
        o: [B, H * K], low: [B, G * rank + padding], out: [B, padded D].
        picked: [index_topk, K] selected entries of one row.
        found: [entries] index scores of one row, order: [entries] int64, the same as integers of the same order.
    """

    wide: Any
    latent: Any
    q: Any
    index_q: Any
    flat: Any
    scores: Any
    highest: Any
    totals: Any
    weights: Any
    pool: Any
    o: Any
    low: Any
    out: Any
    picked: Any
    found: Any
    order: Any


class Compression(NamedTuple):
    """One compressor: `ape` [m, channels], norm [K], its first kv and gate columns in `wide`, first column of entries in its keys."""

    ape: Any
    norm: Any
    kv_at: int
    gate_at: int
    entries_at: int


@compiled()
def project(x, weights, buffers, eps, count):
    """Project the first `count` rows of `x` [B, D]: everything that reads the input, the query latent, the queries."""
    wide, latent, q, rank = buffers.wide, buffers.latent, buffers.q, len(weights.q_norm)
    product((at(x, 0), x.shape[1]), weights.wide, (at(wide, 0), wide.shape[1]), count)
    for b in range(count):
        normalise(wide[b, :rank], weights.q_norm, eps, latent[b])
    product((at(latent, 0), rank), weights.wq_b, (at(q, 0), q.shape[1]), count)


@compiled()
def put_window(weights, buffers, keys, rows, around):
    """Normalise and rotate the window key of each row and put it in the ring; `around` = (turns, window, eps)."""
    turns, window, eps = around
    rank, width = len(weights.q_norm), len(weights.kv_norm)
    for b in range(len(rows.slots)):
        position = rows.positions[b]
        key = keys[rows.slots[b], FRONT + position % window]
        normalise(buffers.wide[b, rank : rank + width], weights.kv_norm, eps, key)
        rotate(key, turns[position], ONE)


@compiled()
def compress(how, buffers, state, rows, around):
    """Take one token a row into the rolling state, and emit the entries of blocks that it completes.

    Args:
        how: `Compression`.
        buffers: `wide` holds the projections.
        state: (kv, gate, keys) of the cache: [rows, n, channels] twice, n = 2m with overlap, else m; [rows, columns, K].
        rows: `Rows`.
        around: (turns, eps).

    Source: as `model.compressor.Compressor.decode`.
    """
    kv, gate, keys = state
    turns, eps = around
    ratio, channels = how.ape.shape
    for b in range(len(rows.slots)):
        position, wide = rows.positions[b], buffers.wide[b]
        ring_kv, ring_gate = kv[rows.slots[b]], gate[rows.slots[b]]
        slot, place = position % len(ring_kv), position % ratio
        for c in range(channels):
            ring_kv[slot, c] = wide[how.kv_at + c]
            ring_gate[slot, c] = wide[how.gate_at + c] + how.ape[place, c]
        if place == ratio - 1:
            entry = keys[rows.slots[b], how.entries_at + position // ratio]
            _pool((ring_kv, ring_gate, slot), ratio, buffers, entry)
            normalise(entry, how.norm, eps, entry)
            rotate(entry, turns[position + 1 - ratio], ONE)


@compiled()
def _pool(ring, ratio, buffers, entry):
    """Weigh the tokens of a ring by the softmax of their gates, channel by channel.

    With overlap, tokens of the block that `slot` completes speak through their last channels, those before through their first.
    ring = (kv, gate, slot).
    """
    kv, gate, slot = ring
    width, slots = len(entry), len(kv)
    begin = (slot // ratio) * ratio
    highest, total = buffers.pool[0], buffers.pool[1]
    for c in range(width):
        highest[c], total[c], entry[c] = _NONE, ZERO, ZERO
    for s in range(slots):
        at = width if slots > ratio and begin <= s < begin + ratio else 0
        for c in range(width):
            highest[c] = max(highest[c], gate[s, at + c])
    for s in range(slots):
        at = width if slots > ratio and begin <= s < begin + ratio else 0
        for c in range(width):
            weight = exp(gate[s, at + c] - highest[c])
            total[c] += weight
            entry[c] += weight * kv[s, at + c]
    for c in range(width):
        entry[c] /= total[c]


@compiled()
def _transpose(q, flat, head, scale):
    """Scale up to 16 heads of `q` [H, K] from `head` on and lay them out as [K, 16], zeros after the last."""
    heads, width = min(LANES, len(q) - head), q.shape[1]
    for k in range(width):
        for h in range(LANES):
            flat[k, h] = q[head + h, k] * scale if h < heads else ZERO
    return heads


@compiled()
def attend(buffers, keys, sink, rows, around):
    """Attend from every row to its window, its compressed entries and the sink, and rotate the output back.

    Args:
        buffers: queries in `q`, output in `o`; `index_q` holds index queries where there is an indexer.
        keys: (keys [rows, columns, K], index_keys [rows, entries, K']) of the cache.
        sink: [H].
        rows: `Rows`.
        around: (turns, window, ratio, index_topk, column of the indexer's head weights, index heads, eps).
    """
    turns, window, ratio, topk, weights_at, index_heads, eps = around
    cached, index_keys = keys
    heads, width = len(sink), cached.shape[2]
    scale = ONE / np.sqrt(np.float32(width))
    for b in range(len(rows.slots)):
        position, own = rows.positions[b], cached[rows.slots[b]]
        near = min(position + 1, window)
        entries = (position + 1) // ratio if ratio else 0
        far, begin = own, FRONT + window
        if entries > topk:
            _index_scores(buffers, index_keys[rows.slots[b]], (b, entries, weights_at, index_heads), turns[position])
            _pick(buffers, own[begin:], entries, topk)
            far, begin, entries = buffers.picked, 0, topk
        q = buffers.q[b, : heads * width].reshape(heads, width)
        for h in range(heads):
            inverse = inverse_rms(q[h], eps)
            for k in range(width):
                q[h, k] *= inverse
            rotate(q[h], turns[position], ONE)
        o = buffers.o[b].reshape(heads, width)
        for head in range(0, heads, LANES):
            _attend_heads(buffers, (own, near), (far, begin, entries), (q, o, sink, scale), head)
        for h in range(heads):
            rotate(o[h], turns[position], -ONE)


@compiled()
def _attend_heads(buffers, close, distant, heads_of, head):
    """Attend from up to 16 heads of one row: scores [keys, 16], softmax over keys and sink, weighted sums of the keys."""
    (own, near), (far, begin, entries), (q, o, sink, scale) = close, distant, heads_of
    width, count = q.shape[1], near + entries
    heads = _transpose(q, buffers.flat, head, scale)
    window, beyond = at(own, FRONT * width), at(far, begin * width)
    _scores(window, near, buffers, width, 0)
    _scores(beyond, entries, buffers, width, near)
    _softmax(buffers, sink[head : head + heads], count)
    weights, room = buffers.weights, buffers.weights.shape[1]
    out, panels, lanes = (at(o, head * width), width), width // LANES, np.int64(LANES)
    multiply((at(weights, 0), room), (window, width, lanes), out, (heads, panels, near), np.bool_(False))
    multiply((at(weights, near), room), (beyond, width, lanes), out, (heads, panels, entries), np.bool_(True))
    for h in range(heads):
        inverse = ONE / buffers.totals[h]
        for k in range(width):
            o[head + h, k] *= inverse


@compiled()
def _scores(keys, count, buffers, width, row):
    """Multiply `count` keys of some width by the queries in `flat` into the rows of `scores` from `row` on."""
    one, lanes = np.int64(1), np.int64(LANES)
    queries, out = (at(buffers.flat, 0), lanes, lanes), (at(buffers.scores, row * LANES), lanes)
    multiply((keys, width), queries, out, (count, one, width), np.bool_(False))


@compiled()
def _softmax(buffers, sink, count):
    """Exponentiate the first `count` rows of `scores` [keys, 16] into `weights` [16, keys], the sink's share in `totals` only."""
    scores, weights, totals, highest = buffers.scores, buffers.weights, buffers.totals, buffers.highest
    for h in range(LANES):
        highest[h] = sink[h] if h < len(sink) else ZERO
    for j in range(count):
        for h in range(LANES):
            highest[h] = max(highest[h], scores[j, h])
    whole = (count + LANES - 1) // LANES * LANES
    for h in range(len(sink)):
        line, top, total = weights[h], highest[h], ZERO
        for j in range(count):
            line[j] = scores[j, h] - top
        for j in range(count, whole):
            line[j] = _NONE
        for j in range(whole):
            line[j] = exp(line[j])
            total += line[j]
        totals[h] = total + exp(sink[h] - top)


@compiled()
def _index_scores(buffers, index_keys, which, turns):
    """Score the entries of one row: sum_h w_h ReLU(q_h . k_s), into `found`; the common positive factor of w is left out."""
    b, entries, weights_at, heads = which
    width, scores, found = index_keys.shape[1], buffers.scores, buffers.found
    q = buffers.index_q[b, : heads * width].reshape(heads, width)
    found[:entries] = ZERO
    for h in range(heads):
        rotate(q[h], turns, ONE)
    for head in range(0, heads, LANES):
        some = _transpose(q, buffers.flat, head, ONE)
        _scores(at(index_keys, 0), entries, buffers, width, 0)
        for s in range(entries):
            total = ZERO
            for h in range(some):
                total += max(scores[s, h], ZERO) * buffers.wide[b, weights_at + head + h]
            found[s] += total


@compiled()
def _pick(buffers, entries, count, topk):
    """Copy the `topk` entries of the highest scores into `picked`, in their order, ties to the lower number.

    The threshold is found bit by bit from the sign down, in the order of the floats as integers.
    """
    scores, order = buffers.found, buffers.order
    for s in range(count):
        bits = np.int64(bits_of(scores[s]))
        order[s] = -(bits + 2147483648) if bits < 0 else bits  # -0 and 0 are equal
    low, high = np.int64(-2147483648), np.int64(2147483647)
    while low < high:  # the highest threshold that at least topk scores reach
        middle = (low + high + 1) >> 1
        reach = 0
        for s in range(count):
            reach += 1 if order[s] >= middle else 0
        if reach >= topk:
            low = middle
        else:
            high = middle - 1
    above = 0
    for s in range(count):
        above += 1 if order[s] > low else 0
    ties, taken = topk - above, 0
    for s in range(count):
        if order[s] > low or (order[s] == low and ties > 0):
            ties -= 1 if order[s] == low else 0
            copy(entries[s], buffers.picked[taken])
            taken += 1


@compiled()
def output(weights, buffers, count):
    """Project `o` to `out` through the grouped and the last matrix, the first `count` rows."""
    o, low, out = buffers.o, buffers.low, buffers.out
    groups, _, inner, _ = weights.wo_a.shape
    rank = weights.wo_b.shape[1] // groups
    for g in range(groups):  # in this order: the padding of one group's last panel lies on the next group
        product((at(o, g * inner), o.shape[1]), weights.wo_a[g], (at(low, g * rank), low.shape[1]), count)
    product((at(low, 0), low.shape[1]), weights.wo_b, (at(out, 0), out.shape[1]), count)
