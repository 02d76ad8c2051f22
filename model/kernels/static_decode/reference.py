"""The operations of a static decoding step in plain torch; arguments as in `op`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from model.cache import FRONT
from model.kernels.experts.op import routed_experts, swiglu
from model.kernels.static_decode.rows import Pool, Rows


def _normalised(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return weight x / rms(x) of [B, K] in fp32."""
    return functional.rms_norm(x.float(), x.shape[-1:], weight.float(), eps)


def _turned(x: Tensor, turns: Tensor) -> Tensor:
    """Rotate the last pairs of [..., K] by cosines and sines [..., R / 2, 2]."""
    still, pairs = x.split([x.shape[-1] - 2 * turns.shape[-2], 2 * turns.shape[-2]], -1)
    even, odd = pairs.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = turns[..., 0], turns[..., 1]
    return torch.cat([still, torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)], -1)


def put_window(kv: Tensor, weight: Tensor, keys: Tensor, rows: Rows, *, window: int) -> None:
    """Compute `op.put_window`."""
    new = _turned(_normalised(kv, weight, rows.eps), rows.turns[rows.positions])
    keys[torch.arange(len(kv), device=kv.device), FRONT + rows.positions % window] = new.to(keys.dtype)


def compress(kv: Tensor, gate: Tensor, pool: Pool, rows: Rows) -> None:
    """Compute `op.compress`."""
    positions, ratio, size = rows.positions, pool.ratio, pool.kv.shape[1]
    row, slot = torch.arange(len(kv), device=kv.device), positions % size
    pool.kv[row, slot] = kv.float()
    pool.gate[row, slot] = gate.float() + pool.ape.float()[positions % ratio]
    kvs, gates = pool.kv, pool.gate
    if size > ratio:
        later = torch.arange(size, device=kv.device) >= ratio
        own = (later == (slot >= ratio).unsqueeze(1)).unsqueeze(2)  # [B, 2m, 1]; the other half is the previous block
        width = kvs.shape[2] // 2
        kvs, gates = (torch.where(own, ring[..., width:], ring[..., :width]) for ring in (kvs, gates))
    entry = _normalised((gates.softmax(1) * kvs).sum(1), pool.weight, rows.eps)
    entry = _turned(entry, rows.turns[(positions + 1 - ratio).clamp(min=0)]).to(pool.entries.dtype)
    complete, number = ((positions + 1) % ratio == 0).unsqueeze(1), positions // ratio
    pool.entries[row, number] = torch.where(complete, entry, pool.entries[row, number])


def list_keys(positions: Tensor, keys: Tensor, *, window: int, ratio: int, chosen: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """Compute `op.list_keys`."""
    most = window + ((keys.shape[1] - FRONT - window) if chosen is None else chosen[0].shape[1])
    slot = torch.arange(most, device=keys.device)
    seen = (positions + 1).unsqueeze(1)
    near = seen.clamp(max=window)
    entry = slot - near
    if chosen is None:
        far = seen // ratio if ratio else torch.zeros_like(seen)
    else:
        far = chosen[1].unsqueeze(1)
        entry = chosen[0].long().gather(1, entry.clamp(0, chosen[0].shape[1] - 1))
    first = torch.arange(len(keys), device=keys.device).unsqueeze(1) * keys.shape[1]
    at = first + FRONT + torch.where(slot < near, slot, window + entry)
    return torch.where(slot < near + far, at, 0).int(), (near + far).squeeze(1).int()


def attend(q: Tensor, keys: Tensor, listed: tuple[Tensor, Tensor], sink: Tensor) -> Tensor:
    """Compute `op.attend`."""
    rows, count = listed
    mine = keys[rows.long()].float()  # [B, k, K]
    scores = torch.bmm(q.float() * q.shape[2] ** -0.5, mine.mT)
    unseen = torch.arange(rows.shape[1], device=q.device) >= count.unsqueeze(1)
    scores = scores.masked_fill_(unseen.unsqueeze(1), float("-inf"))
    scores = torch.cat([scores, sink.float().view(1, -1, 1).expand(len(q), -1, 1)], 2)
    return torch.bmm(scores.softmax(-1)[..., :-1], mine).to(q.dtype)


def experts(x: Tensor, indices: Tensor, weights: Tensor, matrices: tuple[Tensor, Tensor, Tensor], *, limit: float) -> Tensor:
    """Compute `op.experts`."""
    return routed_experts(x, indices, weights, matrices, limit=limit)


def gate_halves(x: Tensor, *, limit: float) -> Tensor:
    """Compute `op.gate_halves`."""
    gate, up = x.chunk(2, 1)
    return swiglu(gate, up, limit)


def choose(logits: Tensor, draws: Tensor, temperature: Tensor, tokens: Tensor, logprobs: Tensor) -> None:
    """Compute `op.choose`."""
    log_p = torch.log_softmax(logits / torch.where(temperature > 0, temperature, 1.0), -1)
    p = log_p.exp()
    cumulative = p.cumsum(-1)
    drawn = torch.searchsorted(cumulative, draws[:, None] * cumulative[:, -1:], right=True)[:, 0]
    last = (p > 0).long().cumsum(-1).argmax(-1)  # the first place of the highest count: the last token of any probability
    found = torch.where(temperature > 0, torch.minimum(drawn, last), log_p.argmax(-1))
    tokens.copy_(found)
    logprobs.copy_(log_p.gather(1, found[:, None])[:, 0])
