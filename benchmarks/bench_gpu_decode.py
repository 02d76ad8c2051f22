"""Time the attention sub-layer of one decoding step on a GPU, V4-Flash against V3.2, both ours: batch 1, bf16, long contexts.

    python benchmarks/bench_gpu_decode.py [--profile] [--lengths 131072 1048576]

A step has everything between the sub-layer's input and its output: projections, norms, rotations, cache writes, compressors, the indexer
over all its entries, selection, attention. V4 runs `model.static_step`, as generation does; V3.2 the same operations in its own order. Of
the steps of a layer that compresses, one in `ratio` completes an entry: the mean is printed. Each kind of layer is timed as replays of a
CUDA graph of several steps that take turns with other weights and caches, hundreds of megabytes each, so that little is found in the 50 MB
of L2 cache; then summed over the layers.

The analytic ratios are of bytes, weights plus what a step reads of the cache, both in bf16, which bound a step of one token, and of FLOPs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from model.cache import FRONT, LayerCache, Step, layer_cache
from model.config import AnyConfig, ModelConfig, V32Config
from model.efficiency import CSA, HCA, parts
from model.kernels.indexer.listed import select_entries
from model.kernels.indexer.tokens import put_key, turn_queries
from model.kernels.sparse_attention.listed import attend_latents, put_latent
from model.kernels.static_decode import op
from model.kernels.static_decode.rows import Rows
from model.linear import wide_product
from model.mla import MLA
from model.norm import rms_norm
from model.rope import inverse_frequencies, rotate, rotations
from model.static_step import Shared, StaticStep
from model.transformer import Transformer

FLASH = ModelConfig(compress_ratios=[0, 0, *[CSA, HCA] * 20, CSA, 0])
V32 = V32Config()
COPIES = 2
"""Layers of a kind that take turns."""
ROUNDS = 2
"""Turns in one graph."""


class LatentStep:
    """One decoding step of MLA over fixed buffers, in static shapes and without waiting for the host.

    Attributes:
        mla: whose parameters are read in place.
        inputs: [N, D], the matrices that read the sub-layer's input, one below the other.
        scaled: [R'] fp32, the query norm's weight times the softmax scale; the index scores grow by it too, their order stays.
    """

    def __init__(self, mla: MLA) -> None:
        self.mla, indexer = mla, mla.indexer
        joint = [mla.wq_a.weight, mla.wkv_a.weight, indexer.wk.weight, indexer.weights_proj.weight]
        self.sizes, self.inputs = [len(weight) for weight in joint], torch.cat(joint)
        self.scaled = mla.q_norm.weight.float() * mla.scale
        halves = mla.wkv_b.weight.view(mla.heads, -1, mla.rank).split([mla.nope, mla.value], 1)
        self.to_latent, self.to_value = (half.contiguous() for half in halves)

    def attend(self, x: Tensor, rows: Rows, cache: LayerCache) -> Tensor:
        """Take one token a row [B, D], put it in the cache, and return [B, D]."""
        own, indexer = self.mla, self.mla.indexer
        assert cache.index_keys is not None
        latent, key, index_key, weights = wide_product(x, self.inputs).split(self.sizes, 1)
        latent = rms_norm(latent, self.scaled, rows.eps, dtype=x.dtype)
        put_latent(key, own.kv_norm, cache.keys, rows, front=FRONT)
        put_key(index_key, indexer.k_norm, cache.index_keys, rows)
        index_q = turn_queries(functional.linear(latent, indexer.wq_b.weight).unflatten(1, (indexer.heads, indexer.width)), rows)
        count = (rows.positions + 1).int()
        chosen = select_entries(index_q, cache.index_keys, weights.contiguous(), count, indexer.count)
        listed = op.list_keys(rows.positions, cache.keys, window=0, ratio=1, chosen=chosen)
        out = attend_latents(self._query(latent, rows), cache.keys.flatten(0, 1), *listed, values=own.rank)
        values = torch.bmm(out.transpose(0, 1), self.to_value.mT).transpose(0, 1)
        return own.wo(values.flatten(1))

    def _query(self, latent: Tensor, rows: Rows) -> Tensor:
        """Return the queries [B, H, R + rotated], the unrotated part mapped to the latents' space."""
        own = self.mla
        turns = torch.view_as_complex(rows.turns.index_select(0, rows.positions)).unsqueeze(1)
        q = rotate(own.wq_b(latent).unflatten(1, (own.heads, -1)), turns)
        absorbed = torch.bmm(q[..., : own.nope].transpose(0, 1), self.to_latent).transpose(0, 1)
        return torch.cat([absorbed, q[..., own.nope :]], -1)


def turns_of(config: AnyConfig, length: int) -> Tensor:
    """Tabulate the rotations of a model's compressing layers by position, [length, R / 2, 2] fp32."""
    return torch.view_as_real(rotations(torch.arange(length, device="cuda"), inverse_frequencies(config, compressed=True)))


def randomised(module: torch.nn.Module) -> None:
    """Draw matrices as for training; vectors stay as they are."""
    for parameter in module.parameters():
        if parameter.ndim >= 2:
            parameter.normal_(0, 0.02)


def v4_steps(length: int) -> tuple[dict[str, list[Callable[[], object]]], Callable[[int], None]]:
    """Make the steps of V4-Flash's kinds of layers, `COPIES` of each, for up to `length` tokens, and what puts them at a position."""
    ratios = [0, CSA, HCA] * COPIES
    small = {"vocab_size": 64, "n_routed_experts": 8, "moe_intermediate_size": 64, "num_nextn_predict_layers": 0, "num_hash_layers": 0}
    config = replace(FLASH, compress_ratios=ratios, num_hidden_layers=len(ratios), **small)  # only attention is run
    with torch.device("cuda"):
        model = Transformer(config).bfloat16()
    static = StaticStep(model, rows=1, capacity=length)
    positions, tables = static.cache.positions, static.tables
    rows = {kind: Rows(positions, table, config.rms_norm_eps) for kind, table in tables.items()}
    turns = {kind: torch.view_as_complex(table[:1].clone()) for kind, table in tables.items()}
    token, visible = (torch.zeros(1, device="cuda", dtype=dtype) for dtype in (torch.int64, torch.int32))
    shared = Shared(tokens=token, rows=rows, turns=turns, visible=visible, lists={})
    steps: dict[str, list[Callable[[], object]]] = {"window": [], "CSA": [], "HCA": []}
    x = torch.randn(1, config.hidden_size, device="cuda", dtype=torch.bfloat16)
    for ratio, weights, cache in zip(ratios, static.weights.layers, static.cache.layers, strict=True):
        fill(cache)
        kind = {0: "window", CSA: "CSA", HCA: "HCA"}[ratio]
        steps[kind].append(lambda weights=weights, cache=cache: static.attend(x, weights, cache, shared))

    def place(position: int) -> None:
        positions.fill_(position)
        visible.fill_((position + 1) // CSA)
        shared.lists.clear()
        for kind, table in tables.items():
            torch.view_as_real(turns[kind]).copy_(table[position : position + 1])

    return steps, place


def v32_steps(length: int) -> list[Callable[[], object]]:
    """Make the steps of V3.2's layers, `COPIES`, at a context of `length` tokens."""
    turns, steps = turns_of(V32, length), list[Callable[[], object]]()
    rows = Rows(torch.full((1,), length - 1, device="cuda"), turns, V32.rms_norm_eps)
    x = torch.randn(1, V32.hidden_size, device="cuda", dtype=torch.bfloat16)
    for _ in range(COPIES):
        with torch.device("cuda"):
            mla = MLA(V32).bfloat16()
        randomised(mla)
        cache = layer_cache(V32, 1, rows=1, capacity=length, device="cuda", dtype=torch.bfloat16)
        fill(cache)
        step = LatentStep(mla)
        steps.append(lambda step=step, cache=cache: step.attend(x, rows, cache))
    return steps


def fill(cache: LayerCache) -> None:
    """Draw what a cache holds; the zero key of the sink stays."""
    cache.keys[:, FRONT:].normal_()
    if cache.index_keys is not None:
        cache.index_keys.normal_()


def check() -> None:
    """Print how far V3.2's step is from the module's own decoding, at a context that selects; V4's step has tests of its own."""
    config, length = replace(V32, index_topk=256), 1000
    torch.manual_seed(0)
    with torch.device("cuda"):
        mla = MLA(config).bfloat16()
    randomised(mla)
    cache = layer_cache(config, 1, rows=2, capacity=length, device="cuda", dtype=torch.bfloat16)
    fill(cache)
    positions = torch.tensor([length - 1, 700], device="cuda")
    x = torch.randn(2, config.hidden_size, device="cuda", dtype=torch.bfloat16)
    expected = mla.decode(x, Step(config, positions), cache).float()
    got = LatentStep(mla).attend(x, Rows(positions, turns_of(config, length), config.rms_norm_eps), cache).float()
    print(f"V3.2 step against MLA.decode: relative difference {float((got - expected).norm() / expected.norm()):.4f}")


def captured(steps: list[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """Record the steps in turns."""
    for step in steps:
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(ROUNDS):
            for step in steps:
                step()
    return graph


def time_us(steps: list[Callable[[], object]], *, repeats: int = 20) -> float:
    """Return the median time of a step."""
    graph, times = captured(steps), []
    for _ in range(repeats + 3):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1e3 / (ROUNDS * len(steps)))
    return sorted(times[3:])[repeats // 2]


def attention_parts(config: AnyConfig, length: int) -> tuple[float, float]:
    """Return FLOPs and bytes that a token needs in all attention sub-layers: weights and what is read of the cache, in bf16."""
    groups = ("dense", "core attention", "indexer", "compressor")
    found = [part for part in parts(config, length) if part.group in groups and part.name != "mlp"]
    layers, width, index = config.num_hidden_layers, config.key_width, config.index_head_dim
    ratios = config.compress_ratios[:layers]
    csa, hca, every = ratios.count(CSA), ratios.count(HCA), ratios.count(1)
    keys = layers * config.sliding_window + (csa + every) * config.index_topk + hca * (length // HCA)
    scored = csa * (length // CSA) + every * length
    return sum(part.flops for part in found), 2.0 * (sum(part.params for part in found) + keys * width + scored * index)


def profile(steps: list[Callable[[], object]], name: str, *, rows: int = 24) -> None:
    """Print the kernels of one step."""
    graph = captured(steps)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]) as recorded:
        graph.replay()
        torch.cuda.synchronize()
    events = [e for e in recorded.key_averages() if e.self_device_time_total and e.device_type == torch.autograd.DeviceType.CUDA]
    number = ROUNDS * len(steps)
    print(f"{name}: {sum(e.self_device_time_total for e in events) / number:.1f} us in {sum(e.count for e in events) / number:.1f} kernels")
    for event in sorted(events, key=lambda e: -e.self_device_time_total)[:rows]:
        print(f"  {event.self_device_time_total / number:7.2f} us {event.count / number:4.1f}  {event.key[:110]}")


@torch.no_grad()
def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--lengths", type=int, nargs="+", default=[131072, 1048576])
    parser.add_argument("--profile", action="store_true", help="list the kernels of each kind of layer at the last length")
    options = parser.parse_args()
    check()
    counts = {
        kind: FLASH.compress_ratios[: FLASH.num_hidden_layers].count(ratio) for kind, ratio in {"window": 0, "CSA": CSA, "HCA": HCA}.items()
    }
    print(f"{'tokens':>8}  us a layer: window, CSA, HCA; MLA   ms a model: V4, V3.2   measured  by bytes  by FLOPs   GB: V4, V3.2")
    for length in options.lengths:
        (v4, place), v32 = v4_steps(length), v32_steps(length)
        times = {}
        for kind, ratio in {"window": 1, "CSA": CSA, "HCA": HCA}.items():
            place(length - 2)
            usual = time_us(v4[kind])
            place(length - 1)
            times[kind] = usual + (time_us(v4[kind]) - usual) / ratio
        times["MLA"] = time_us(v32)
        ours = sum(times[kind] * count for kind, count in counts.items()) / 1e3
        theirs = times["MLA"] * V32.num_hidden_layers / 1e3
        (flops, read), (other_flops, other_read) = attention_parts(FLASH, length), attention_parts(V32, length)
        print(
            f"{length:8}  {times['window']:.1f}, {times['CSA']:.1f}, {times['HCA']:.1f}; {times['MLA']:.1f}   {ours:.3f}, {theirs:.3f}   "
            f"{theirs / ours:.2f}  {other_read / read:.2f}  {other_flops / flops:.2f}   {read / 1e9:.2f}, {other_read / 1e9:.2f}",
            flush=True,
        )
        if options.profile and length == options.lengths[-1]:
            place(length - 2)
            for kind, steps in {**v4, "MLA": v32}.items():
                profile(steps, f"{kind} at {length}")


if __name__ == "__main__":
    main()
