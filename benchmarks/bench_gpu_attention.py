"""Time sparse attention on a GPU, forward and backward, beside torch and beside the floor that the chip's measured ceilings give.

    python benchmarks/bench_gpu_attention.py [--compile] [--long]

Full-K: every query lists as many entries as it may, drawn from all there are. Causal: one sample, entries drawn from those complete.
FLOPs are of the listed pairs only, 4 K H a pair forward and 10 K H backward, whatever a kernel really multiplies.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from gpu_timing import median_ms
from torch import Tensor

from model.config import ModelConfig
from model.kernels.sparse_attention.listed import attend_listed
from model.kernels.sparse_attention.op import sparse_attention
from model.layout import PackedRow

WIDTH, WINDOW = 512, 128
CONFIG = ModelConfig(num_hidden_layers=2, compress_ratios=[4, 128], num_nextn_predict_layers=0, head_dim=WIDTH, sliding_window=WINDOW)


@dataclass
class Case:
    """One row of the table: `tokens` queries of `heads` heads that list `listed` entries of one in `ratio` tokens; limits in ms."""

    name: str
    tokens: int
    heads: int = 64
    listed: int = 0
    ratio: int = 0
    full: bool = False
    forward_ms: float = 0.0
    backward_ms: float = 0.0
    both_ms: float = 0.0
    peer: bool = False


CASES = (
    Case("CSA full-K 512", 4096, listed=512, ratio=4, full=True, forward_ms=0.98, backward_ms=3.44, peer=True),
    Case("CSA full-K 1024", 4096, heads=128, listed=1024, ratio=4, full=True, backward_ms=12.0),
    Case("CSA causal", 8192, listed=512, ratio=4, both_ms=8.0),
    Case("HCA causal", 8192, ratio=128, forward_ms=0.9, backward_ms=2.5),
    Case("window only", 8192, forward_ms=0.9, backward_ms=2.5),
    Case("CSA causal", 32768, listed=512, ratio=4, backward_ms=40.0),
    Case("CSA full-K 512", 32768, listed=512, ratio=4, full=True, backward_ms=40.0),
)
LONG = (Case("CSA causal", 65536, listed=512, ratio=4), Case("HCA causal", 65536, ratio=128))


def ceilings() -> tuple[float, float]:
    """Measure the bf16 matrix product, FLOP/s, and the copy, bytes/s read and written."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    flops = 2 * 8192**3 / median_ms(lambda: a @ b) * 1e3
    x, y = (torch.empty(2**30, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return flops, 2 * x.nbytes / median_ms(lambda: y.copy_(x)) * 1e3


def make(case: Case) -> tuple[PackedRow, list[Tensor | None], Tensor]:
    """Draw inputs: the row; q, kv, ckv, indices and sink; the output's gradient."""
    torch.manual_seed(0)
    row = PackedRow(CONFIG, torch.tensor([0, case.tokens], device="cuda"), case.tokens)
    new = {"device": "cuda", "dtype": torch.bfloat16}
    q, grad = (torch.randn(case.tokens, case.heads, WIDTH, **new) for _ in range(2))
    kv, sink, ckv, indices = torch.randn(case.tokens, WIDTH, **new), torch.randn(case.heads, device="cuda"), None, None
    if case.ratio:
        entries = row.entries[case.ratio]
        ckv = torch.randn(len(entries.first), WIDTH, **new)
        if case.full:
            entries = replace(entries, tokens=torch.zeros_like(entries.tokens), visible=torch.full_like(entries.visible, len(ckv)))
            row.entries[case.ratio] = entries
    if case.listed:
        seen = entries.visible[:, None]
        place = torch.arange(case.listed, device="cuda") + torch.rand(case.tokens, case.listed, device="cuda")
        spread = (place * (seen / case.listed)).long()  # one of each of `listed` equal parts, so none twice
        every = torch.arange(case.listed, device="cuda").expand_as(spread)
        indices = torch.where(seen >= case.listed, spread, torch.where(every < seen, every, -1))
    return row, [q, kv, ckv, indices, sink], grad


def pairs(row: PackedRow, indices: Tensor | None, ratio: int) -> int:
    """Count the pairs of a query and a key that it sees."""
    count = int((row.position + 1).clamp(max=WINDOW).sum())
    if ratio:
        count += int(row.entries[ratio].visible.sum() if indices is None else (indices >= 0).sum())
    return count


def eager(q: Tensor, kv: Tensor, ckv: Tensor, indices: Tensor, sink: Tensor, *, row: PackedRow, ratio: int) -> Tensor:
    """Attend with products of whole matrices in bf16 and a mask, as a model without kernels does."""
    place = torch.arange(row.length, device=q.device)
    seen = (place <= place[:, None]) & (place > place[:, None] - row.window)
    chosen = torch.zeros(row.length, len(ckv) + 1, device=q.device, dtype=torch.bool)
    chosen.scatter_(1, torch.where(indices < 0, len(ckv), indices), True)
    keys, seen = torch.cat([kv, ckv]), torch.cat([seen, chosen[:, :-1]], 1)
    scores = (torch.einsum("thk,sk->ths", q, keys) * q.shape[-1] ** -0.5).masked_fill(~seen[:, None], -torch.inf)
    scores = torch.cat([scores, sink.to(scores.dtype)[None, :, None].expand(len(q), -1, 1)], -1)
    return torch.einsum("ths,sk->thk", scores.softmax(-1)[..., :-1], keys)


def time_both(op: Callable[..., Tensor], made: tuple[PackedRow, list[Tensor | None], Tensor], ratio: int) -> tuple[float, float]:
    """Return the time of the forward pass, and of the backward: both passes less the forward."""
    row, inputs, grad = made
    leaves = [x if x is None or not x.is_floating_point() else x.detach().requires_grad_() for x in inputs]
    wanted = [x for x in leaves if x is not None and x.requires_grad]
    forward = median_ms(lambda: op(*inputs, row=row, ratio=ratio))
    return forward, median_ms(lambda: torch.autograd.grad(op(*leaves, row=row, ratio=ratio), wanted, grad)) - forward


def time_decoding(batch: int, listed: int, ceiling: tuple[float, float], limit_us: float) -> None:
    """Print the time of one token a row that attends to listed rows of a bf16 cache: replays of a CUDA graph, on cold caches in turn."""
    torch.manual_seed(0)
    new = {"device": "cuda", "dtype": torch.bfloat16}
    caches = [torch.randn(batch * listed * 2, WIDTH, **new) for _ in range(3)]
    q, sink = torch.randn(batch, 64, WIDTH, **new), torch.randn(64, device="cuda")
    rows = torch.rand(batch, 2 * listed, device="cuda").topk(listed).indices + torch.arange(batch, device="cuda")[:, None] * 2 * listed
    count = torch.full((batch,), listed, device="cuda", dtype=torch.int32)
    rows = rows.int()
    attend_listed(q, caches[0], rows, count, sink)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for cache in caches:
            attend_listed(q, cache, rows, count, sink)
    time_us = median_ms(graph.replay) * 1e3 / len(caches)
    floor_us = max(batch * listed * 1024 / ceiling[1], 4.0 * WIDTH * 64 * batch * listed / ceiling[0]) * 1e6
    print(
        f"decoding, batch {batch}, {listed} rows each, 64 heads: {time_us:.1f} us, floor {floor_us:.1f}, at most {limit_us:g}", flush=True
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--compile", action="store_true", help="time torch.compile of the eager form too: a minute more")
    parser.add_argument("--long", action="store_true", help="65536 tokens too")
    options = parser.parse_args()
    flops, bandwidth = ceilings()
    print(f"{torch.cuda.get_device_name()}: bf16 product {flops / 1e12:.0f} TFLOP/s, copy {bandwidth / 1e12:.2f} TB/s; ms (TFLOP/s)")
    print(f"{'':16} {'tokens':>6} {'heads':>5}  {'forward':>14} {'backward':>14} {'both':>7}  {'floors':>12}  {'at most':>14}  peak GiB")
    for case in CASES + (LONG if options.long else ()):
        made = make(case)
        row, inputs, _ = made
        work = 4.0 * WIDTH * case.heads * pairs(row, inputs[3], case.ratio)
        traffic = 2.0 * inputs[0].nbytes  # type: ignore[union-attr]
        floors = max(work / flops, traffic / bandwidth) * 1e3, max(2.5 * work / flops, 2 * traffic / bandwidth) * 1e3
        torch.cuda.reset_peak_memory_stats()
        forward, backward = time_both(sparse_attention, made, case.ratio)
        limits = "/".join(f"{limit:g}" if limit else "-" for limit in (case.forward_ms, case.backward_ms, case.both_ms))
        print(
            f"{case.name:16} {case.tokens:6} {case.heads:5}  {forward:7.3f} ({work / forward / 1e9:4.0f}) "
            f"{backward:7.3f} ({2.5 * work / backward / 1e9:4.0f}) {forward + backward:7.3f}  {floors[0]:5.3f} {floors[1]:6.3f}  "
            f"{limits:>14}  {torch.cuda.max_memory_allocated() / 2**30:.1f}",
            flush=True,
        )
        if case.peer:
            peers = {"torch eager": eager} | ({"torch.compile": torch.compile(eager)} if options.compile else {})
            for name, peer in peers.items():
                f, b = time_both(peer, made, case.ratio)
                print(f"  {name:14} {'':12}  {f:7.3f} {'':6} {b:7.3f} {'':6} {f + b:7.3f}  {(f + b) / (forward + backward):.0f} times ours")
    time_decoding(128, 640, (flops, bandwidth), 60)
    time_decoding(1, 640, (flops, bandwidth), 60)
    time_decoding(1, 8320, (flops, bandwidth), 60)


if __name__ == "__main__":
    main()
