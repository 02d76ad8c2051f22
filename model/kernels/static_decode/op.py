"""The operations between the matrix products of one decoding step: which implementation runs.

Shapes depend on shapes alone and on a GPU nothing waits for the host, so that a CUDA graph can hold a step. Arithmetic in fp32.
"""

from __future__ import annotations

from torch import Tensor

from model.kernels.choice import implementation_for
from model.kernels.static_decode import reference
from model.kernels.static_decode.rows import Pool, Rows


def put_window(kv: Tensor, weight: Tensor, keys: Tensor, rows: Rows, *, window: int) -> None:
    """Normalise and rotate a window key a row, and put it in its ring.

    Args:
        kv: [B, K], rows any distance apart.
        weight: [K] of the norm.
        keys: [B, columns, K] as `model.cache.LayerCache` keeps them, written.
        rows: positions and rotations.
        window: slots of the ring.
    """
    if implementation_for(kv) == "reference":
        reference.put_window(kv, weight, keys, rows, window=window)
        return
    from model.kernels.static_decode import fused  # brings Triton, which a CPU does without

    fused.put_window(kv, weight, keys, rows, window=window)


def compress(kv: Tensor, gate: Tensor, pool: Pool, rows: Rows) -> None:
    """Put a token a row into the compressor's rings, and the entries of the blocks that are complete now into `pool.entries`.

    Args:
        kv, gate: [B, c * K] projections, rows equally far apart in both.
        pool: parameters and state; rings and entries are written.
        rows: positions and rotations.

    Source: v4_spec 2.2.
    """
    if implementation_for(kv) == "reference":
        reference.compress(kv, gate, pool, rows)
        return
    from model.kernels.static_decode import fused  # brings Triton, which a CPU does without

    fused.compress(kv, gate, pool, rows)


def list_keys(
    positions: Tensor, keys: Tensor, *, window: int, ratio: int, chosen: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """List the keys that each row sees: its window, and its entries, all or chosen ones.

    Args:
        positions: [B] int64.
        keys: [B, columns, K] as `model.cache.LayerCache` keeps them.
        window: slots of the ring.
        ratio: tokens an entry, 0 without entries.
        chosen: entry numbers [B, k] int32 and how many [B] int32; None lists all complete entries.

    Returns:
        [B, window + entries] int32 rows of the keys of all rows [B * columns, K], first of all, and [B] int32 how many.
    """
    if implementation_for(keys) == "reference":
        return reference.list_keys(positions, keys, window=window, ratio=ratio, chosen=chosen)
    from model.kernels.static_decode import fused  # brings Triton, which a CPU does without

    return fused.list_keys(positions, keys, window=window, ratio=ratio, chosen=chosen)


def attend(q: Tensor, keys: Tensor, listed: tuple[Tensor, Tensor], sink: Tensor) -> Tensor:
    """Attend from queries [B, H, K] to the rows of keys [N, K] that `list_keys` listed, and to the sink [H]; returns [B, H, K]."""
    if implementation_for(q) == "reference":
        return reference.attend(q, keys, listed, sink)
    from model.kernels.sparse_attention.listed import attend_listed  # brings Triton, which a CPU does without

    return attend_listed(q, keys, *listed, sink)


def experts(x: Tensor, indices: Tensor, weights: Tensor, matrices: tuple[Tensor, Tensor, Tensor], *, limit: float) -> Tensor:
    """Sum the chosen experts of [B, D] tokens; arguments as of `model.kernels.experts.op.routed_experts`."""
    if implementation_for(x) == "reference":
        return reference.experts(x, indices, weights, matrices, limit=limit)
    from model.kernels.static_decode import fused_experts  # brings Triton, which a CPU does without

    return fused_experts.experts(x, indices, weights, matrices, limit=limit)


def gate_halves(x: Tensor, *, limit: float) -> Tensor:
    """Return silu(min(g, limit)) clamp(u, -limit, limit) of rows [B, 2F] that are g, then u: [B, F]."""
    if implementation_for(x) == "reference":
        return reference.gate_halves(x, limit=limit)
    from model.kernels.experts import gated  # brings Triton, which a CPU does without

    return gated.swiglu(x, limit)


def choose(logits: Tensor, draws: Tensor, temperature: Tensor, tokens: Tensor, logprobs: Tensor) -> None:
    """Choose a token a row by inverting the distribution function, at temperature 0 the most likely one, ties to the lower.

    Args:
        logits: [B, V] fp32.
        draws: [B] fp32 in [0, 1).
        temperature: [1] fp32.
        tokens: [B] int32 out.
        logprobs: [B] fp32 out, nats, under the distribution that was drawn from; of the unheated one at temperature 0.
    """
    if implementation_for(logits) == "reference":
        reference.choose(logits, draws, temperature, tokens, logprobs)
        return
    from model.kernels.static_decode import fused  # brings Triton, which a CPU does without

    fused.choose(logits, draws, temperature, tokens, logprobs)
