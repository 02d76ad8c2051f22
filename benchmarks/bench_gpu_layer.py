"""Time whole attention layers of V4-Flash on a GPU, forward and backward, beside transformers' eager ones in the same run.

    python benchmarks/bench_gpu_layer.py [--peer] [--profile]

One sample a row, bf16, gradients of the input and of all weights that a language-model loss trains. Peak memory is what comes on top of
weights and input. `linear` is the time a token over that of 16384 tokens.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from gpu_timing import median_ms
from torch import Tensor, nn

from model.attention import Attention
from model.config import ModelConfig
from model.layout import PackedRow

CONFIG = ModelConfig(num_hidden_layers=3, compress_ratios=[0, 4, 128], num_nextn_predict_layers=0, num_hash_layers=0)
KINDS = {"window": 0, "CSA": 1, "HCA": 2}
CASES = {"CSA": (4096, 8192, 16384, 32768, 65536), "HCA": (8192, 65536), "window": (8192,)}
PEER = {"CSA": (4096, 8192), "HCA": (8192,)}
BASE = 16384
"""Tokens from which on time should be linear."""

Times = tuple[float, float, float]


@torch.no_grad()
def randomised(layer: nn.Module) -> nn.Module:
    """Put a layer on the GPU in bf16 with weights drawn as for training; vectors stay as made."""
    layer = layer.to(device="cuda", dtype=torch.bfloat16)
    for parameter in layer.parameters():
        if parameter.ndim >= 2:
            parameter.normal_(0, 0.02)
    return layer


def ours(kind: str, tokens: int) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """Make our layer and its pass over [T, D]."""
    layer = randomised(Attention(CONFIG, KINDS[kind]))
    row = PackedRow(CONFIG, torch.tensor([0, tokens], device="cuda"), tokens)
    return layer, lambda x: layer(x, row)


def eager(kind: str, tokens: int) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """Make transformers' layer and its pass over [T, D]."""
    from transformers.models.deepseek_v4 import modeling_deepseek_v4 as peer
    from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config

    config = DeepseekV4Config(**CONFIG.to_dict())
    config._attn_implementation = "eager"
    layer = randomised(peer.DeepseekV4Attention(config, KINDS[kind]))
    nn.init.zeros_(layer.sinks)
    rotary, place = peer.DeepseekV4RotaryEmbedding(config).cuda(), torch.arange(tokens, device="cuda")[None]
    like = torch.empty(1, tokens, 1, device="cuda", dtype=torch.bfloat16)
    turns = {name: rotary(like, position_ids=place, layer_type=name) for name in ("main", "compress")}
    near = (place.mT >= place) & (place.mT < place + CONFIG.sliding_window)
    mask = torch.zeros(1, 1, tokens, tokens, device="cuda", dtype=torch.bfloat16).masked_fill_(~near, torch.finfo(torch.bfloat16).min)
    return layer, lambda x: layer(x[None], turns, place, mask)[0][0]


def measure(make: Callable[[str, int], tuple[nn.Module, Callable[[Tensor], Tensor]]], kind: str, tokens: int) -> Times:
    """Return the time forward, of both passes, and the peak of extra memory in GiB."""
    torch.manual_seed(0)
    layer, run = make(kind, tokens)
    x = torch.randn(tokens, CONFIG.hidden_size, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]
    grad = torch.randn_like(x)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    # No loss here trains what is unused in theirs.
    both = median_ms(lambda: torch.autograd.grad(run(x), wanted, grad, allow_unused=True), repeats=5, warmup=1)
    peak = (torch.cuda.max_memory_allocated() - before) / 2**30
    with torch.no_grad():
        forward = median_ms(lambda: run(x), repeats=5, warmup=1)
    return forward, both, peak


def profile(kind: str, tokens: int, *, rows: int = 30) -> None:
    """Print the kernels of one forward and backward pass that take longest."""
    layer, run = ours(kind, tokens)
    x = torch.randn(tokens, CONFIG.hidden_size, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]
    grad = torch.randn_like(x)
    torch.autograd.grad(run(x), wanted, grad)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]) as recorded:
        torch.autograd.grad(run(x), wanted, grad)
        torch.cuda.synchronize()
    events = [e for e in recorded.key_averages() if e.self_device_time_total and e.device_type == torch.autograd.DeviceType.CUDA]
    events.sort(key=lambda e: -e.self_device_time_total)
    print(f"{kind} {tokens}: {sum(e.self_device_time_total for e in events) / 1e3:.2f} ms in {sum(e.count for e in events)} launches")
    for event in events[:rows]:
        print(f"  {event.self_device_time_total / 1e3:8.3f} ms {event.count:4}  {event.key[:110]}")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--peer", action="store_true", help="time transformers' eager layers too")
    parser.add_argument("--profile", action="store_true", help="list the kernels of a CSA layer of 8192 tokens")
    options = parser.parse_args()
    print(
        f"{'layer':8} {'tokens':>6}  {'forward ms':>10} {'both ms':>9}  {'extra GiB':>9}  {'linear':>6}  eager: forward, both, GiB, ratio"
    )
    for kind, lengths in CASES.items():
        base = 0.0
        for tokens in lengths:
            forward, both, peak = measure(ours, kind, tokens)
            base = both / tokens if tokens == BASE else base
            line = f"{kind:8} {tokens:6}  {forward:10.3f} {both:9.3f}  {peak:9.2f}  {both / tokens / base if base else 0:6.2f}"
            if options.peer and tokens in PEER.get(kind, ()):
                theirs = measure(eager, kind, tokens)
                line += f"  {theirs[0]:.1f}, {theirs[1]:.1f}, {theirs[2]:.1f}, {theirs[1] / both:.1f}"
            print(line, flush=True)
            torch.cuda.empty_cache()
    if options.profile:
        profile("CSA", 8192)


if __name__ == "__main__":
    main()
