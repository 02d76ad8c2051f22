"""One rank of a short training run, as a process of its own: prints the loss curve as JSON.

usage: python rank_program.py MODEL_DIR RANK RANKS ZERO_STAGE RENDEZVOUS [sample | spoil | checked | scattered]

With `sample` it computes in bf16, every parameter cut up at ZeRO 3, and prints greedy answers before it trains.
With `spoil` the last rank's gradients of the third step are not numbers, and it prints which steps were skipped, having changed nothing.
With `checked` the same in bf16, and DeepSpeed looks at the gradients itself.
With `scattered` gradients lie apart in memory, not in one buffer.
"""

import hashlib
import json
import math
import os
import sys

import numpy as np
import torch

from domains.config import DomainConfig
from domains.types import Prompt
from runtime.batch import PackedSample, pack, split
from runtime.config import OptimizerConfig, SamplingConfig
from runtime.engine import Engine
from runtime.spec import EngineSpec, LossSpec
from runtime.step import DomainSetup

CUT_UP = {"reduce_scatter": False, "stage3_param_persistence_threshold": 0}
"""Gloo has no reduce-scatter; and parameters as small as these are otherwise never cut up."""


def samples_of_step(step: int) -> list[PackedSample]:
    """Make a few samples of different lengths, the same for every layout of ranks."""
    random = np.random.default_rng(step)
    lengths = random.integers(5, 40, size=6)
    return [PackedSample(random.integers(20, 250, size=n).tolist(), [False] + [True] * int(n - 1)) for n in lengths]


def digest(engine: Engine) -> str:
    """Hash the model's parameters and buffers, as far as they are on this rank."""
    return hashlib.sha256(b"".join(t.detach().float().numpy().tobytes() for t in engine.model.state_dict().values())).hexdigest()


def main() -> None:
    """Train six steps and print the losses and a digest of the weights."""
    model, rank, ranks, stage, rendezvous = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
    optimizer = OptimizerConfig(lr=0.01, grad_clip=1.0)
    zero = {"zero_optimization": {"stage": stage}}
    sampling = SamplingConfig(temperature=0.0, max_new_tokens=12)
    domains = {"math": DomainSetup(name="math", domain=DomainConfig(kind="math"), sampling=sampling)}
    option = "".join(sys.argv[6:])
    if option == "scattered":
        zero["zero_optimization"]["contiguous_gradients"] = False
    elif option == "checked" or (option and stage):
        zero = {"zero_optimization": {"stage": stage} | (CUT_UP if stage == 3 else {}), "bf16": {"enabled": True}}
    if option == "checked":
        zero["bf16"]["check_grad_overflow"] = True
    engine = Engine(EngineSpec(model=model, optimizer=optimizer, deepspeed=zero, ranks=ranks, rendezvous=rendezvous, domains=domains), rank)
    if option == "sample":
        prompts = [Prompt(f"math/train/{i}", "math", [{"role": "user", "content": f"{i} + {i} = "}], {}) for i in range(3)]
        answers = [sample.tokens for sample in engine.generate(prompts, [0] * 3, sampling, samples=1)]
        print("ANSWERS " + json.dumps(answers), flush=True)
    spec = LossSpec("experts.loss:cross_entropy", balance_weight=1e-3)
    losses, skipped, norms = [], [], []
    for step in range(6):
        rows = pack(samples_of_step(step % 2), row_tokens=48)
        total = float(sum(row.target_count for row in rows))
        spoiled = option in ("spoil", "checked") and step == 2 and rank == ranks - 1
        hook = engine.model.norm.weight.register_hook(lambda g: torch.full_like(g, math.nan)) if spoiled else None
        before = digest(engine)
        sums, done = engine.train_step(split(rows, ranks)[rank], spec, total, lr=0.01, router_bias_speed=1e-3)
        if hook is not None:
            hook.remove()
        if "actor/skipped" in done:
            skipped.append((step, digest(engine) == before))
        losses.append(sums["loss"] / total)
        norms.append(done.get("actor/grad_norm"))
    print("SKIPPED " + json.dumps(skipped), flush=True)
    print("NORMS " + json.dumps(norms), flush=True)
    print("LOSSES " + json.dumps(losses), flush=True)
    engine.close()
    # Gloo's threads may still drop the last collective's tensors; while the interpreter shuts down that aborts the process (torch 2.13).
    os._exit(0)


main()
