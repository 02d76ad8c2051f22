"""Pooling of token blocks into compressed entries: overlapping for CSA, disjoint for HCA, one entry at a time in decoding."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.cache import CompressorState, PrefillPlan, Step
from model.config import ModelConfig
from model.kernels.choice import implementation_for
from model.layout import PackedRow
from model.linear import joint_linear, linear
from model.norm import RMSNorm
from model.rope import rotate


class Compressor(nn.Module):
    """Turn every m tokens of a sample into one entry of width K, a softmax-weighted mean per channel.

    With m = 4 an entry also weighs the m tokens before its own: the first K channels of a token serve the next entry, the last K its own.

    Attributes:
        wkv, wgate: D -> c * K, c = 2 for m = 4, else 1.
        ape: [m, c * K] added to the gate by the token's place in its block.
        norm: of the pooled entry.

    Source: v4_spec 2.2.
    """

    def __init__(self, config: ModelConfig, ratio: int, width: int) -> None:
        super().__init__()
        self.ratio, self.overlaps = ratio, ratio == 4
        channels = width * (2 if self.overlaps else 1)
        self.wkv = linear(config.hidden_size, channels)
        self.wgate = linear(config.hidden_size, channels)
        self.ape = nn.Parameter(torch.zeros(ratio, channels))
        self.norm = RMSNorm(width, config.rms_norm_eps)

    def forward(self, x: Tensor, row: PackedRow, state: CompressorState | None = None, plan: PrefillPlan | None = None) -> Tensor:
        """Compress a packed row [U, D] into its entries [C, K]; in a prefill (U = T), leave each sample's tail in `state`."""
        return self.pool(joint_linear(x, self.wkv, self.wgate), row, state, plan)

    def pool(
        self, projected: tuple[Tensor, ...], row: PackedRow, state: CompressorState | None = None, plan: PrefillPlan | None = None
    ) -> Tensor:
        """Do the same from what `wkv` and `wgate` make of the row, each [U, c * K]."""
        entries, (kv, gate) = row.entries[self.ratio], projected
        dtype = kv.dtype
        if implementation_for(kv) == "triton":
            from model.kernels.pooling import fused  # brings Triton, which a CPU does without

            self._keep_tail(projected, row, state, plan)
            pooled = fused.pool(kv, gate, self.ape, entries, overlaps=self.overlaps, shared=row.source is not None)
            return self.norm(pooled, entries.turns).to(dtype)
        kv, gate = kv.float(), gate.float()
        self._keep_tail((kv, gate), row, state, plan)
        kv = kv.index_select(0, entries.computed).view(*entries.tokens.shape, kv.shape[1])  # [C, m, c * K]
        gate = gate.index_select(0, entries.computed).view(*entries.tokens.shape, gate.shape[1]) + self.ape.float()
        if self.overlaps:
            kv, gate = _with_previous(kv), _with_previous(gate)
            gate[:, : self.ratio].masked_fill_(entries.first.view(-1, 1, 1), float("-inf"))  # an infinite gate weighs 0
        return rotate(self._pool(kv, gate).to(dtype), entries.turns)

    def decode(self, x: Tensor, step: Step, state: CompressorState) -> tuple[Tensor, Tensor] | None:
        """Take one token a row [B, D]; returns the rows [n] that completed a block and their entries [n, K], or None."""
        kv, gate = self.wkv(x).float(), self.wgate(x).float() + self.ape.float()[step.position % self.ratio]
        slot = step.position % state.kv.shape[1]
        state.kv[step.rows, slot], state.gate[step.rows, slot] = kv, gate
        rows = step.completed[self.ratio]
        if rows is None:
            return None
        kv, gate = state.kv[rows], state.gate[rows]
        if self.overlaps:
            later = torch.arange(2 * self.ratio, device=x.device) >= self.ratio
            own = (later == (slot[rows] >= self.ratio).unsqueeze(1)).unsqueeze(2)  # [n, 2m, 1]; the other half is the previous block
            width = kv.shape[2] // 2
            kv, gate = (torch.where(own, ring[..., width:], ring[..., :width]) for ring in (kv, gate))
        return rows, rotate(self._pool(kv, gate).to(x.dtype), step.entry_turns[self.ratio])

    def _keep_tail(self, projected: tuple[Tensor, ...], row: PackedRow, state: CompressorState | None, plan: PrefillPlan | None) -> None:
        """In a prefill, leave each sample's unfinished entry in `state`."""
        if state is not None and plan is not None:
            kv, gate = (each.float() for each in projected)
            plan.keep_tail(state, kv, gate + self.ape.float()[row.position % self.ratio])

    def _pool(self, kv: Tensor, gate: Tensor) -> Tensor:
        return self.norm((gate.softmax(1) * kv).sum(1))


def _with_previous(blocks: Tensor) -> Tensor:
    """Put the previous block's first channels before each block's last channels: [C, m, 2K] to [C, 2m, K]; the first has a stray block."""
    width = blocks.shape[2] // 2
    return torch.cat([blocks[..., :width].roll(1, 0), blocks[..., width:]], 1)
