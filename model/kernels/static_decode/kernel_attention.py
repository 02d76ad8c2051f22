"""Window ring, compressor rings and key lists of one token a row. Arithmetic in fp32; rotated pairs are adjacent."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _turned(even, odd, turns, position, pair, first, half):
    """Rotate the pairs from `first` on by the angles of a position, turns [*, half - first, 2]."""
    rotated = (pair >= first) & (pair < half)
    at = turns + (position * (half - first) + pair - first) * 2
    cos, sin = tl.load(at, rotated, 1.0), tl.load(at + 1, rotated, 0.0)
    return even * cos - odd * sin, even * sin + odd * cos


@triton.jit
def put_window(kv, weight, keys, positions, turns, stride, apart, front, window, half, first, eps, PAIRS: tl.constexpr):
    """Normalise and rotate one row's window key and put it in its ring, `front` columns into the row of `keys`."""
    row = tl.program_id(0).to(tl.int64)
    position = tl.load(positions + row)
    pair = tl.arange(0, PAIRS)
    inside = pair < half
    even = tl.load(kv + row * stride + 2 * pair, inside, 0.0).to(tl.float32)
    odd = tl.load(kv + row * stride + 2 * pair + 1, inside, 0.0).to(tl.float32)
    place = row * apart + (front + position % window) * (2 * half)
    _put(even, odd, weight, keys, place, turns, position, pair, first, half, eps)


@triton.jit
def _put(even, odd, weight, out, place, turns, position, pair, first, half, eps):
    """Normalise one row given by its pairs, scale and rotate it, and store it in `out` from `place` on."""
    inside = pair < half
    inverse = tl.rsqrt(tl.sum(even * even + odd * odd, 0) / (2 * half) + eps)
    even *= inverse * tl.load(weight + 2 * pair, inside, 0.0).to(tl.float32)
    odd *= inverse * tl.load(weight + 2 * pair + 1, inside, 0.0).to(tl.float32)
    even, odd = _turned(even, odd, turns, position, pair, first, half)
    at = out + place + 2 * pair
    tl.store(at, even.to(out.dtype.element_ty), inside)
    tl.store(at + 1, odd.to(out.dtype.element_ty), inside)


@triton.jit
def _keep(x, ape, state, source, biased, ring, inside):
    """Move one channel of every pair of the new token's gates, with the bias of its place, into the ring, and return it."""
    value = tl.load(x + source, inside, 0.0).to(tl.float32)
    value += tl.load(ape + biased, inside, 0.0).to(tl.float32)
    tl.store(state + ring, value, inside)
    return value


@triton.jit
def _copy(x, state, source, ring, inside):
    """Move one channel of every pair of the new token's values into the ring, and return it."""
    value = tl.load(x + source, inside, 0.0).to(tl.float32)
    tl.store(state + ring, value, inside)
    return value


@triton.jit
def _fold(gate, kv, top, total, sums):
    """Fold gates and values [TOKENS, PAIRS] into the running maximum, sum and weighted sum [PAIRS]."""
    higher = tl.maximum(top, tl.max(gate, 0))
    weight = tl.exp(gate - higher[None, :])
    shrink = tl.exp(top - higher)
    return higher, total * shrink + tl.sum(weight, 0), sums * shrink + tl.sum(weight * kv, 0)


@triton.jit
def compress(kv, gate, ape, weight, kvs, gates, into, pooled, positions, turns, stride, apart, half, first, eps,
             RATIO: tl.constexpr, OVERLAPS: tl.constexpr, WHOLE: tl.constexpr, TOKENS: tl.constexpr, PAIRS: tl.constexpr):  # fmt: skip
    """Put one row's token into the compressor's ring, and where it completes a block, the block's entry into `into`.

    A program takes PAIRS pairs of channels: all of them (WHOLE), or a part of them, whose means go into `pooled` for `place_entries`.

    Args:
        kv, gate: [B, c * K] with rows `stride` apart. ape: [RATIO, c * K].
        kvs, gates: [B, n, c * K] fp32, the rings; the token's own slot is not read, so nothing waits for its store.
        into: entries of a row side by side, rows `apart` apart (WHOLE).
        pooled: [B, K] fp32 out, of rows that complete a block (not WHOLE).
    """
    row = tl.program_id(0).to(tl.int64)
    position = tl.load(positions + row)
    width = 2 * half
    ring_size = 2 * RATIO if OVERLAPS else RATIO
    channels = 2 * width if OVERLAPS else width
    own = width if OVERLAPS else 0
    slot = position % ring_size
    pair = tl.program_id(1) * PAIRS + tl.arange(0, PAIRS)
    inside = pair < half
    ring = row * ring_size * channels
    source, biased, here = row * stride + 2 * pair, position % RATIO * channels + 2 * pair, ring + slot * channels + 2 * pair
    if OVERLAPS:
        _copy(kv, kvs, source, here, inside)
        _copy(kv, kvs, source + 1, here + 1, inside)
        _keep(gate, ape, gates, source, biased, here, inside)
        _keep(gate, ape, gates, source + 1, biased + 1, here + 1, inside)
    new_even = _copy(kv, kvs, source + own, here + own, inside)
    new_odd = _copy(kv, kvs, source + own + 1, here + own + 1, inside)
    gate_even = _keep(gate, ape, gates, source + own, biased + own, here + own, inside)
    gate_odd = _keep(gate, ape, gates, source + own + 1, biased + own + 1, here + own + 1, inside)
    if (position + 1) % RATIO == 0:
        top_even, top_odd = tl.full([PAIRS], -3e38, tl.float32), tl.full([PAIRS], -3e38, tl.float32)
        total_even, total_odd = tl.zeros([PAIRS], tl.float32), tl.zeros([PAIRS], tl.float32)
        sums_even, sums_odd = tl.zeros([PAIRS], tl.float32), tl.zeros([PAIRS], tl.float32)
        for start in range(0, ring_size, TOKENS):
            token = start + tl.arange(0, TOKENS)[:, None]
            half_of = tl.where((token >= RATIO) == (slot >= RATIO), own, 0) if OVERLAPS else token * 0
            at = ring + token * channels + half_of + 2 * pair[None, :]
            new, mask = token == slot, inside[None, :] & (token != slot)
            even = tl.where(new, new_even[None, :], tl.load(kvs + at, mask, 0.0))
            odd = tl.where(new, new_odd[None, :], tl.load(kvs + at + 1, mask, 0.0))
            weigh_even = tl.where(new, gate_even[None, :], tl.load(gates + at, mask, 0.0))
            weigh_odd = tl.where(new, gate_odd[None, :], tl.load(gates + at + 1, mask, 0.0))
            top_even, total_even, sums_even = _fold(weigh_even, even, top_even, total_even, sums_even)
            top_odd, total_odd, sums_odd = _fold(weigh_odd, odd, top_odd, total_odd, sums_odd)
        even = tl.where(inside, sums_even / total_even, 0.0)
        odd = tl.where(inside, sums_odd / total_odd, 0.0)
        if WHOLE:
            place = row * apart + position // RATIO * width
            _put(even, odd, weight, into, place, turns, position + 1 - RATIO, pair, first, half, eps)
        else:
            tl.store(pooled + row * width + 2 * pair, even, inside)
            tl.store(pooled + row * width + 2 * pair + 1, odd, inside)


@triton.jit
def place_entries(pooled, weight, into, positions, turns, apart, half, first, eps, RATIO: tl.constexpr, PAIRS: tl.constexpr):
    """Normalise and rotate what `compress` pooled in parts, and put it into `into`; only rows that complete a block have something."""
    row = tl.program_id(0).to(tl.int64)
    position = tl.load(positions + row)
    if (position + 1) % RATIO == 0:
        pair = tl.arange(0, PAIRS)
        at = pooled + row * (2 * half) + 2 * pair
        even, odd = tl.load(at, pair < half, 0.0), tl.load(at + 1, pair < half, 0.0)
        place = row * apart + position // RATIO * (2 * half)
        _put(even, odd, weight, into, place, turns, position + 1 - RATIO, pair, first, half, eps)


@triton.jit
def list_keys(positions, chosen, number, rows, count, front, window, ratio, columns, k, picks,
              CHOSEN: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """List one row's keys: its part of the window, then all its entries or with CHOSEN the numbered ones.

    Args:
        chosen: [B, picks] int32 entry numbers, number: [B] int32 how many (CHOSEN).
        rows: [B, k] int32 out, rows of all rows' keys [B * columns]. count: [B] int32 out.
    """
    row = tl.program_id(0).to(tl.int64)
    slot = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    seen = tl.load(positions + row) + 1
    near = tl.minimum(seen, window)
    entry = slot - near
    if CHOSEN:
        far = tl.load(number + row).to(tl.int64)
        entry = tl.load(chosen + row * picks + entry, (entry >= 0) & (entry < far), 0).to(tl.int64)
    else:
        far = seen // ratio
    at = front + tl.where(slot < near, slot, window + entry)
    tl.store(rows + row * k + slot, (row * columns + at).to(tl.int32), (slot < near + far) & (slot < k))
    tl.store(count + row, (near + far).to(tl.int32))
