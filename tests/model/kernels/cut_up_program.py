"""One rank of two training steps in fp32 with every loss there is, as a process of its own: prints what it measured as JSON.

usage: python cut_up_program.py MODEL_DIR RANK RANKS KERNELS RENDEZVOUS

More than one rank cut up every parameter between them (ZeRO 3), however small; one rank has them whole.
"""

import json
import os
import sys

import numpy as np

from model.kernels.choice import choose
from runtime import objective
from runtime.batch import PackedSample, pack, split
from runtime.config import OptimizerConfig
from runtime.engine import Engine
from runtime.spec import EngineSpec, LossSpec

CUT_UP = {"stage": 3, "reduce_scatter": False, "stage3_param_persistence_threshold": 0}
"""Gloo has no reduce-scatter; and parameters as small as these are otherwise never cut up."""

STEPS = 2
"""In the first one ZeRO 3 learns which module reads which parameter, in the next it fetches them ahead."""


def samples() -> list[PackedSample]:
    """Make two rows of two samples, short, for the interpreter takes long."""
    random = np.random.default_rng(0)
    return [PackedSample(random.integers(20, 250, size=n).tolist(), [False] + [True] * (n - 1)) for n in (17, 9, 19, 7)]


def main() -> None:
    """Train, and print what each step measured as a share of all targets."""
    directory, rank, ranks, kernels, rendezvous = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5]
    zero = {"zero_optimization": CUT_UP if ranks > 1 else {"stage": 0}}
    optimizer = OptimizerConfig(lr=0.01, grad_clip=1.0)
    spec = EngineSpec(model=directory, optimizer=optimizer, deepspeed=zero, ranks=ranks, rendezvous=rendezvous)
    spec.train_indexer = spec.train_mtp = True
    engine = Engine(spec, rank)
    objective.PAD_TOKENS = 8
    # The optimizer's kernels read no cut up parameter, and take the interpreter long.
    engine.optimizer.register_step_pre_hook(lambda *_: choose("reference"))
    options = {"mtp_weight": 0.3} if engine.model.mtp else {}
    loss = LossSpec("experts.loss:cross_entropy", balance_weight=1e-2, indexer_weight=1e-2, indexer="sparse", **options)
    measured = []
    for _ in range(STEPS):
        rows = pack(samples(), row_tokens=28)
        total = float(sum(row.target_count for row in rows))
        choose(kernels)
        sums, _ = engine.train_step(split(rows, ranks)[rank], loss, total, lr=0.01, router_bias_speed=1e-3)
        measured.append({name: value / total for name, value in sums.items()})
    print("MEASURED " + json.dumps(measured), flush=True)
    engine.close()
    # Gloo's threads may still drop the last collective's tensors; while the interpreter shuts down that aborts the process (torch 2.13).
    os._exit(0)


main()
