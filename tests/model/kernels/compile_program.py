"""Compile the Triton kernels of training, decoding and quantisation for Hopper on a machine without a GPU, as a process of its own.

The paths run on CPU tensors, every launch stops after compiling, and what a kernel would have written stays zero. Prints a line of JSON:
the number of compiled variants by kernel, the shared memory of the largest, and what did not compile.

usage: python compile_program.py
"""

import json
from collections import defaultdict
from types import SimpleNamespace

import torch
from hydra import compose, initialize_config_dir
from triton.backends.compiler import GPUTarget
from triton.errors import TritonError
from triton.runtime import driver
from triton.runtime.jit import JITFunction

found: dict[str, dict[str, int]] = defaultdict(dict)
failed: dict[str, str] = {}


def only_compile() -> None:
    """Make Triton believe in a Hopper GPU and stop every launch after compiling; make new memory zero."""
    target = GPUTarget("cuda", 90, 32)
    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: target,
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
            get_active_torch_device=lambda: torch.device("cpu"),
        )
    )
    run = JITFunction.run

    def compile_alone(self, *args, grid, warmup, **options):
        name = f"{self.fn.__module__.removeprefix('model.kernels.')}.{self.fn.__name__}"
        try:
            kernel = run(self, *args, grid=grid, warmup=True, **options)
        except (TritonError, RuntimeError) as error:  # of the front end and ptxas; of the passes between them
            failed.setdefault(name, f"{type(error).__name__}: {str(error)[:500]}")
            return
        found[name][kernel.hash] = kernel.metadata.shared

    JITFunction.run = compile_alone
    torch.empty, torch.empty_like, torch.Tensor.new_empty = torch.zeros, torch.zeros_like, torch.Tensor.new_zeros


def small(**overrides):
    """Return the architecture of conf/model/small.yaml, changed."""
    from pipeline.config import CONF, architecture, convert, register

    register()
    with initialize_config_dir(str(CONF), version_base=None):
        changes = [f"model.{key}={value}" for key, value in overrides.items()]
        return architecture(convert(compose("config", ["+stage=all", "model=small", *changes])).model)


def train(model) -> None:
    """Pass a packed row forward and backward with every loss."""
    from model.kernels.logprob.op import token_logprobs
    from model.kernels.reverse_kl.op import reverse_kl

    cu_seqlens = torch.tensor([0, 150, 190, 490, 493, 512])
    tokens = torch.randint(0, 600, (512,))
    for indexer in ("dense", "sparse"):
        hidden = model(tokens, cu_seqlens, indexer=indexer)
        logprobs = model.head(hidden.last[:-1], lambda h, weight: token_logprobs(h, weight, tokens[1:])[0])
        ahead = model.mtp_hidden(hidden, tokens, cu_seqlens).float().sum()
        (logprobs.sum() + hidden.balance_loss + hidden.indexer_loss + ahead).backward()
    student, teacher = hidden.last.detach().requires_grad_(), (hidden.last.detach(), model.head.weight.detach())
    total, _ = model.head(student, lambda h, weight: reverse_kl(h, weight, teacher, torch.ones(512), chunk=256))
    total.backward()


def attend_as_flash() -> None:
    """Attend with V4-Flash's heads, which have kernels of their own on Hopper."""
    from model.kernels.sparse_attention import fused, fused_backward, launch, listed
    from model.kernels.sparse_attention.op import sparse_attention
    from model.layout import PackedRow

    for module in (fused, fused_backward, listed):
        module.on_hopper = launch.fits_hopper
    config = small(sliding_window=128)
    for lengths, ratio in (([300, 212], 0), ([300, 212], 4), ([300, 212], 128), ([1024], 4)):  # the last has too many entries to own
        tokens = sum(lengths)
        row = PackedRow(config, torch.tensor([0, *lengths]).cumsum(0), tokens)
        q, kv = (torch.randn(*shape, dtype=torch.bfloat16, requires_grad=True) for shape in ((tokens, 64, 512), (tokens, 512)))
        entries = torch.randn(len(row.entries[ratio].first), 512, dtype=torch.bfloat16, requires_grad=True) if ratio else None
        indices = torch.zeros(tokens, 32, dtype=torch.int64) if ratio == 4 else None
        sparse_attention(q, kv, entries, indices, torch.zeros(64, requires_grad=True), row=row, ratio=ratio).sum().backward()


def decode_long() -> None:
    """Attend and select for single tokens of long contexts, V4-Flash and V3.2; select with FP8 keys in a row."""
    from model.kernels.indexer.listed import select_entries
    from model.kernels.indexer.op import select
    from model.kernels.indexer.tokens import put_key, turn_queries
    from model.kernels.sparse_attention.listed import attend_latents, attend_listed, put_latent
    from model.kernels.static_decode.rows import Rows
    from model.layout import PackedRow
    from model.norm import LayerNorm, RMSNorm

    for batch, listed in ((1, 640), (1, 8320), (128, 640)):
        places, count = torch.zeros(batch, listed, dtype=torch.int32), torch.full((batch,), listed, dtype=torch.int32)
        attend_listed(torch.zeros(batch, 64, 512).bfloat16(), torch.zeros(8320, 512).bfloat16(), places, count, torch.zeros(64))
    count = torch.full((1,), 2048, dtype=torch.int32)
    attend_latents(
        torch.zeros(1, 128, 576).bfloat16(), torch.zeros(4096, 576).bfloat16(), torch.zeros(1, 2048, dtype=torch.int32), count, values=512
    )
    rows = Rows(torch.zeros(1, dtype=torch.int64), torch.zeros(4096, 32, 2), 1e-6)
    put_latent(torch.zeros(1, 576).bfloat16(), RMSNorm(512, 1e-6).bfloat16(), torch.zeros(1, 4097, 576).bfloat16(), rows, front=1)
    put_key(torch.zeros(1, 128).bfloat16(), LayerNorm(128).bfloat16(), torch.zeros(1, 4096, 128).bfloat16(), rows)
    turn_queries(torch.zeros(1, 64, 128).bfloat16(), rows)
    for batch, entries in ((1, 1 << 17), (64, 512)):
        count = torch.full((batch,), entries, dtype=torch.int32)
        select_entries(
            torch.zeros(batch, 64, 128).bfloat16(), torch.zeros(batch, entries, 128).bfloat16(), torch.zeros(batch, 64), count, 128
        )
    row = PackedRow(small(index_topk=32), torch.tensor([0, 512]), 512)
    q, keys = torch.zeros(512, 64, 128), torch.zeros(128, 128)
    weights = torch.zeros(512, 64)
    select(q.bfloat16(), keys.bfloat16(), weights, row=row, ratio=4, count=32)
    select(q.to(torch.float8_e4m3fn), keys.to(torch.float8_e4m3fn), weights, row=row, ratio=4, count=32, key_scale=torch.ones(128))


def step_weights() -> None:
    """Make one step of Muon and one of Adam."""
    from runtime.config import OptimizerConfig
    from runtime.optim import HybridOptimizer

    for name in ("muon", "adamw"):
        parameter = torch.nn.Parameter(torch.zeros(512, 1024))
        parameter.grad = torch.zeros_like(parameter)
        HybridOptimizer([("w", parameter)], OptimizerConfig(name=name)).step()


def main() -> None:
    """Compile what one step of each kind launches."""
    only_compile()
    from model.kernels.choice import choose
    from model.kernels.newton_schulz.op import orthogonalize
    from model.kernels.quant import op as quant
    from model.quant import qat
    from model.quant.grid import E2M1
    from model.static_step import StaticStep
    from model.transformer import Transformer

    choose("triton")
    model = Transformer(small(num_hidden_layers=3, compress_ratios="[0,4,128,0]")).bfloat16()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    train(model)
    for rows in (16, 128, 512):
        StaticStep(model, rows=rows, capacity=256).run(rows)
    attend_as_flash()
    decode_long()
    for shape in ((2, 640, 2048), (2, 200, 301)):
        orthogonalize(torch.randn(shape).half())
    step_weights()
    x = torch.randn(64, 512).bfloat16()
    for rounded in (qat.fake_quantize_mxfp4, qat.fake_quantize_fp8, qat.fake_quantize_kv, qat.fake_quantize_index):
        rounded(x)
    quant.quantize_fp8(x, group=128), quant.quantize_mxfp4(x), quant.fake_quantize_both(x, group=32, grid=E2M1)
    summary = {"variants": {name: len(each) for name, each in found.items()}, "failed": failed}
    print("COMPILED " + json.dumps(summary | {"shared": {name: max(each.values()) for name, each in found.items()}}), flush=True)


main()
