"""One rank of a short training run, as a process of its own: prints the loss curve as JSON.

usage: python rank_program.py MODEL_DIR RANK RANKS ZERO_STAGE RENDEZVOUS
"""

import json
import os
import sys

import numpy as np

from runtime.batch import PackedSample, pack, split
from runtime.config import OptimizerConfig
from runtime.engine import Engine
from runtime.spec import EngineSpec, LossSpec


def samples_of_step(step: int) -> list[PackedSample]:
    """Make a few samples of different lengths, the same for every layout of ranks."""
    random = np.random.default_rng(step)
    lengths = random.integers(5, 40, size=6)
    return [PackedSample(random.integers(20, 250, size=n).tolist(), [False] + [True] * int(n - 1)) for n in lengths]


def main() -> None:
    """Train six steps and print the losses and a digest of the weights."""
    model, rank, ranks, stage, rendezvous = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
    optimizer = OptimizerConfig(lr=0.01, grad_clip=1.0)
    zero = {"zero_optimization": {"stage": stage}}
    engine = Engine(EngineSpec(model=model, optimizer=optimizer, deepspeed=zero, ranks=ranks, rendezvous=rendezvous), rank)
    spec = LossSpec("experts.loss:cross_entropy", balance_weight=1e-3)
    losses = []
    for step in range(6):
        rows = pack(samples_of_step(step % 2), row_tokens=48)
        total = float(sum(row.target_count for row in rows))
        sums = engine.forward_backward(split(rows, ranks)[rank], spec, total)
        engine.optim_step(0.01, 1e-3)
        losses.append(sums["loss"] / total)
    print("LOSSES " + json.dumps(losses), flush=True)
    engine.close()
    # Gloo's threads may still drop the last collective's tensors; while the interpreter shuts down that aborts the process (torch 2.13).
    os._exit(0)


main()
