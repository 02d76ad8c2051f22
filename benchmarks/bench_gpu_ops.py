"""Time the Triton operations beside plain torch on one GPU, with the floor that memory and matrix units allow: one table.

Usage: python benchmarks/bench_gpu_ops.py [word ...]    only groups (functions below) whose name contains one of the words
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from gpu_timing import median_ms
from torch import Tensor

from model.config import ModelConfig
from model.kernels.choice import choose
from model.kernels.experts import op as experts_padded
from model.kernels.experts.fused import RoutedExperts
from model.kernels.hyper_connections import op as hyper
from model.kernels.hyper_connections import reference as hyper_reference
from model.kernels.indexer import fused as indexer
from model.kernels.logprob.op import token_logprobs
from model.kernels.logprob.reference import token_logprobs as token_logprobs_plain
from model.kernels.newton_schulz import gram
from model.kernels.newton_schulz.reference import COEFFICIENTS
from model.kernels.quant import op as quant
from model.kernels.reverse_kl.op import reverse_kl
from model.kernels.reverse_kl.reference import reverse_kl as reverse_kl_plain
from model.layout import PackedRow
from model.quant.fp8 import encode_fp8
from model.quant.grid import E2M1, E4M3, onto_grid
from model.quant.mxfp4 import quantize_mxfp4

BF16 = {"device": "cuda", "dtype": torch.bfloat16}


@dataclass
class Row:
    """One line of the table: what ran, in milliseconds, and what it has to do at least."""

    name: str
    ours: float
    peers: dict[str, float]
    flops: float = 0.0
    bytes_moved: float = 0.0
    note: str = ""


def measure_graph(run: Callable[[], object]) -> float:
    """Return the time of `run` in ms as replayed from a CUDA graph, without the launches' gaps."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return median_ms(graph.replay, repeats=20)


def ceilings() -> tuple[float, float, float]:
    """Measure a copy in bytes/s (read and written), and a bf16 product of 8192^3 in FLOP/s: at first, and after half a second of it."""
    x = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    y = torch.empty_like(x)
    copy = 2 * x.numel() / median_ms(lambda: y.copy_(x), repeats=20) * 1e3
    a, b = torch.randn(8192, 8192, **BF16), torch.randn(8192, 8192, **BF16)
    burst, long = (2 * 8192**3 / median_ms(lambda: a @ b.T, repeats=n) * 1e3 for n in (10, 300))
    return copy, burst, long


def losses() -> Iterator[Row]:
    """Reverse KL and token log-probabilities of V4-Flash's vocabulary, 8192 tokens, forward and backward from hidden states."""
    rows, width, vocabulary = 8192, 4096, 129280
    hidden, head = torch.randn(rows, width, **BF16).requires_grad_(), (torch.randn(vocabulary, width, **BF16) * 0.03).requires_grad_()
    teacher = (torch.randn(rows, width, **BF16), torch.randn(vocabulary, width, **BF16) * 0.03)
    weights, targets = torch.ones(rows, device="cuda"), torch.randint(0, vocabulary, (rows,), device="cuda")

    def distill(kernel: Callable, chunk: int) -> Callable[[], object]:
        return lambda: torch.autograd.grad(kernel(hidden, head, teacher, weights, chunk=chunk)[0], (hidden, head))

    def likely(kernel: Callable, chunk: int) -> Callable[[], object]:
        return lambda: torch.autograd.grad(kernel(hidden, head, targets, chunk=chunk)[0].sum(), (hidden, head))

    product = 2.0 * rows * width * vocabulary
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    distill(reverse_kl, 4096)()
    extra = (torch.cuda.max_memory_allocated() - before) / 2**30
    peers = {
        "eager": median_ms(distill(reverse_kl_plain, 1024), repeats=3),
        "compiled": median_ms(compiled_kl(hidden, head, teacher), repeats=3),
    }
    ours = median_ms(distill(reverse_kl, 4096), repeats=5)
    yield Row("reverse KL, both ways, N8192 D4096 V129280", ours, peers, 4 * product, note=f"{extra:.2f} GiB extra")
    peers = {"eager": median_ms(likely(token_logprobs_plain, 1024), repeats=3)}
    yield Row("token log-probs, both ways, same shape", median_ms(likely(token_logprobs, 4096), repeats=5), peers, 4 * product)


def compiled_kl(hidden: Tensor, head: Tensor, teacher: tuple[Tensor, Tensor]) -> Callable[[], object]:
    """Return the same loss by autograd through a compiled function, 1024 rows at a time."""

    @torch.compile
    def piece(a: Tensor, w: Tensor, b: Tensor, v: Tensor) -> Tensor:
        p, q = F.log_softmax((a @ w.T).float(), -1), F.log_softmax((b @ v.T).float(), -1)
        return (p.exp() * (p - q)).sum()

    def run() -> None:
        for i in range(0, len(hidden), 1024):
            piece(hidden[i : i + 1024], head, teacher[0][i : i + 1024], teacher[1]).backward()
        hidden.grad = head.grad = None

    return run


def hyper_connections() -> Iterator[Row]:
    """Mixing out of one sub-layer and into the next, V4-Flash, 8192 tokens, streams in bf16."""
    tokens, width = 8192, 4096
    config = ModelConfig(num_hidden_layers=1, compress_ratios=[0], num_nextn_predict_layers=0)
    streams, factor = torch.randn(tokens, 4, width, **BF16), torch.randn(tokens, width, **BF16)
    small = [torch.rand(tokens, 4), torch.rand(tokens, 4, 4), torch.randn(24, 4 * width) * 0.02, torch.randn(24), torch.ones(3)]
    inputs = [factor, streams, *(t.cuda() for t in small)]

    def ours(f: Tensor, x: Tensor, post: Tensor, comb: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        return hyper.mix_in_through(hyper.mix_out(f, x, post, comb), *parameters, config=config)

    def plain(f: Tensor, x: Tensor, post: Tensor, comb: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        mixed = hyper_reference.mix_out(f.float(), x.float(), post, comb).to(x.dtype)
        with torch.device("cuda"):
            collapsed, post, comb = hyper_reference.mix_in(mixed.float(), *parameters, config=config)
        return collapsed.to(x.dtype), post, comb, mixed

    grads = [torch.randn_like(t) for t in ours(*inputs)]

    def both(layer: Callable) -> Callable[[], object]:
        def run() -> object:
            leaves = [t.detach().requires_grad_() for t in inputs]
            return torch.autograd.grad(layer(*leaves), leaves, grads)

        return run

    forward, total = measure_graph(lambda: ours(*inputs)), measure_graph(both(ours))
    plain_forward, plain_total = median_ms(lambda: plain(*inputs), repeats=5), median_ms(both(plain), repeats=5)
    unit = tokens * width * 2.0
    yield Row("mHC post + pre, forward, N8192 D4096 M4", forward, {"eager": plain_forward}, bytes_moved=10 * unit)
    yield Row("mHC post + pre, backward", total - forward, {"eager": plain_total - plain_forward}, bytes_moved=20 * unit)


def newton_schulz() -> Iterator[Row]:
    """Muon's ten steps on many matrices at once; the peer is the usual form in bf16 on library products."""

    def usual(x: Tensor) -> Tensor:
        x = x / x.norm(dim=(-2, -1), keepdim=True)
        for a, b, c in COEFFICIENTS:
            product = torch.bmm(x, x.mT)
            x = torch.baddbmm(x, torch.baddbmm(product, product, product, beta=b, alpha=c), x, beta=a)
        return x

    for batch, low, high in ((16, 2048, 8192), (16, 2048, 2048), (64, 1024, 4096)):
        x = torch.randn(batch, low, high, **BF16)
        flops = 10.0 * batch * (4 * low * low * high + 2 * low**3)
        peers = {"cuBLAS": median_ms(partial(usual, x), repeats=3)}
        yield Row(f"Newton-Schulz 10 steps, {batch} x {low}x{high}", median_ms(partial(gram.orthogonalize, x), repeats=3), peers, flops)


def selection() -> Iterator[Row]:
    """Index scores and exact top-512 of one causal sample, 64 heads of 128."""
    config = ModelConfig(num_hidden_layers=1, compress_ratios=[4], num_nextn_predict_layers=0)

    def plain(q: Tensor, keys: Tensor, weights: Tensor) -> None:
        for i in range(0, len(q), 256):
            heads = torch.einsum("qhk,ck->qhc", q[i : i + 256], keys).relu_()
            torch.bmm(weights[i : i + 256, None].bfloat16(), heads)[:, 0].float().topk(512)

    for tokens in (8192, 32768):
        row = PackedRow(config, torch.tensor([0, tokens], device="cuda"), tokens)
        q, keys = torch.randn(tokens, 64, 128, **BF16), torch.randn(tokens // 4, 128, **BF16)
        weights = torch.randn(tokens, 64, device="cuda")

        ours = measure_graph(partial(indexer.select, q, keys, weights, row=row, ratio=4, count=512))
        flops = 2.0 * 64 * 128 * tokens * tokens / 8
        yield Row(
            f"indexer + exact top-512, S{tokens}", ours, {"einsum + topk": median_ms(partial(plain, q, keys, weights), repeats=2)}, flops
        )


def quantisation() -> Iterator[Row]:
    """Rounding 8192 x 7168 bf16 numbers; four inputs in turn, so that none is in the cache."""
    inputs = [torch.randn(8192, 7168, **BF16) for _ in range(4)]
    count = inputs[0].numel()
    cases = {
        "FP8 1x128": (lambda x: quant.quantize_fp8(x, group=128), lambda x: encode_fp8(x, (1, 128)), 3 + 1 / 128),
        "MXFP4": (quant.quantize_mxfp4, quantize_mxfp4, 2.5 + 1 / 32),
        "fake FP8": (lambda x: quant.fake_quantize(x, group=128, grid=E4M3), lambda x: onto_grid(x, E4M3, block=(1, 128)), 4),
        "fake MXFP4, rows and columns": (
            lambda x: quant.fake_quantize_both(x, group=32, grid=E2M1),
            lambda x: (onto_grid(x, E2M1, block=(1, 32)), onto_grid(x.T.contiguous(), E2M1, block=(1, 32)).T.contiguous()),
            6,
        ),
    }
    for name, (kernel, plain, size) in cases.items():
        ours = measure_graph(lambda kernel=kernel: [kernel(x) for x in inputs]) / 4
        choose("reference")
        eager = median_ms(lambda plain=plain: plain(inputs[0]), repeats=3)
        choose(None)
        yield Row(f"{name}, 8192 x 7168", ours, {"eager": eager}, bytes_moved=size * count)


def mixture() -> Iterator[Row]:
    """V4-Flash's routed experts: 256 of width 2048, 6 a token, 8192 tokens."""
    tokens, count, active, width, inner = 8192, 256, 6, 4096, 2048
    x, indices = torch.randn(tokens, width, **BF16), torch.rand(tokens, count, device="cuda").topk(active).indices
    shapes = ((count, inner, width), (count, width, inner), (count, inner, width))
    leaves = [x, torch.rand(tokens, active, device="cuda"), *(torch.randn(shape, **BF16).mul_(0.02) for shape in shapes)]
    x, share, *matrices = (t.requires_grad_() for t in leaves)
    grad = torch.randn(tokens, width, **BF16)

    def ours() -> Tensor:
        return RoutedExperts.apply(x, indices, share, *matrices, 10.0)

    def padded() -> Tensor:
        return experts_padded._Experts.apply(x, indices, share, *matrices, 10.0)

    def both(layer: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(layer(), (x, share, *matrices), grad)

    flops = 6.0 * tokens * active * width * inner
    yield Row(
        "experts, forward, T8192 E256 A6 D4096 F2048", median_ms(ours, repeats=5), {"grouped_mm": median_ms(padded, repeats=3)}, flops
    )
    yield Row("experts, both ways", median_ms(both(ours), repeats=5), {"grouped_mm": median_ms(both(padded), repeats=3)}, 3 * flops)


def main(words: list[str]) -> None:
    """Print the table."""
    copy, burst, long = ceilings()
    print(
        f"{torch.cuda.get_device_name()}: copy {copy / 1e9:.0f} GB/s, bf16 8192^3 {burst / 1e12:.0f} TFLOP/s, sustained {long / 1e12:.0f}"
    )
    print(f"{'operation':46s} {'ours ms':>9s} {'floor ms':>9s} {'of floor':>9s}  peers (ms, how many times ours)")
    for group in (losses, hyper_connections, newton_schulz, selection, quantisation, mixture):
        if words and not any(word in group.__name__ for word in words):
            continue
        for row in group():
            floor = max(row.flops / burst, row.bytes_moved / copy) * 1e3
            peers = ", ".join(f"{name} {ms:.3g} ({ms / row.ours:.2f}x)" for name, ms in row.peers.items())
            print(f"{row.name:46s} {row.ours:9.3f} {floor:9.3f} {floor / row.ours:9.0%}  {peers} {row.note}", flush=True)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main(sys.argv[1:])
