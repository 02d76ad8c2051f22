"""One supervised training run on the math domain's demonstrations, as a process of its own: prints the loss curve as JSON.

usage: python curve_program.py MODEL_DIR RENDEZVOUS KERNELS PRECISION ORDER STEPS
"""

import json
import os
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np

from domains.catalog import make_domain
from domains.config import DomainConfig, SandboxConfig
from experts.sft import demonstration_samples
from experts.supervised import take
from runtime.batch import Batch, pack
from runtime.config import OptimizerConfig
from runtime.engine import Engine
from runtime.schedule import learning_rate
from runtime.spec import EngineSpec, LossSpec

ROW_TOKENS = 2048
KEPT = 2
"""Samples at the front of a row that stay there: what fills the row up to a round length is made of them."""


def reordered(batch: Batch) -> Batch:
    """Return the row with its samples but the first in reverse order: the same sums in another order."""
    spans = [np.arange(a, b) for a, b in pairwise(batch.cu_seqlens)]
    order = np.concatenate([*spans[:KEPT], *spans[KEPT:][::-1]])
    lengths = [len(span) for span in [*spans[:KEPT], *spans[KEPT:][::-1]]]
    return Batch(batch.tokens[order], np.concatenate([[0], np.cumsum(lengths)]), batch.targets[order], {})


def main() -> None:
    """Train, routers, MTP block and indexers included; every loss that is printed is the cross-entropy of one step."""
    model, rendezvous, kernels, precision, order, steps = *sys.argv[1:6], int(sys.argv[6])
    optimizer = OptimizerConfig(lr=3e-3, warmup_steps=10)
    deepspeed = {"zero_optimization": {"stage": 1}, "bf16": {"enabled": precision == "bf16"}}
    engine = Engine(
        EngineSpec(
            model=model,
            optimizer=optimizer,
            deepspeed=deepspeed,
            kernels=kernels,
            rendezvous=rendezvous,
            train_mtp=True,
            train_indexer=True,
        )
    )
    domain = make_domain("math", DomainConfig(kind="math"), SandboxConfig())
    samples = demonstration_samples(Path(model), [domain], count=400, seed=0)
    losses, cursor = [], 0
    for step in range(steps):
        cursor, chosen = take(samples, cursor, ROW_TOKENS, seed=0)
        rows = pack(chosen, row_tokens=2 * ROW_TOKENS)
        rows = [reordered(row) for row in rows] if order == "reordered" else rows
        learns = "dense" if step < steps // 2 else "sparse"
        loss = LossSpec("experts.loss:cross_entropy", balance_weight=1e-4, mtp_weight=0.3, indexer_weight=1.0, indexer=learns)
        total = float(sum(row.target_count for row in rows))
        lr = learning_rate(step, config=optimizer, steps=steps)
        sums, _ = engine.train_step(rows, loss, total, lr=lr, router_bias_speed=1e-3)
        losses.append(sums["loss"] / total)
    print("LOSSES " + json.dumps(losses), flush=True)
    domain.close()
    engine.close()
    os._exit(0)  # gloo's threads may still drop the last collective's tensors; while the interpreter shuts down that aborts the process


main()
