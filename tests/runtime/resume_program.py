"""One rank that trains, saves and loads, as a process of its own: prints what was measured of each step as JSON.

usage: python resume_program.py MODEL_DIR ZERO_STAGE RENDEZVOUS ACTION...

Actions, one after the other: `step`; `save DIR`; `save-old DIR`, which writes what checkpoints of ZeRO 1 held when DeepSpeed clipped there
and AdamW counted in tensors; `load DIR`.
"""

import json
import os
import sys

import numpy as np
import torch

from runtime.batch import PackedSample, pack
from runtime.config import OptimizerConfig
from runtime.engine import Engine
from runtime.spec import EngineSpec, LossSpec

GRAD_CLIP = 0.01


def rows_of_a_step() -> list:
    """Make the rows of every step."""
    random = np.random.default_rng(0)
    samples = [PackedSample(random.integers(20, 250, size=20).tolist(), [False] + [True] * 19) for _ in range(3)]
    return pack(samples, row_tokens=48)


def step(engine: Engine) -> dict:
    """Train one step; returns the norm before and after clipping, and AdamW's counts of steps."""
    squares = []

    def note(optimizer, _args, _kwargs):
        squares.extend(p.grad.double().square().sum().item() for group in optimizer.param_groups for p in group["params"])

    hook = engine.optimizer.register_step_pre_hook(note)  # behind the engine's own
    rows = rows_of_a_step()
    _, done = engine.train_step(rows, LossSpec("experts.loss:cross_entropy"), float(sum(row.target_count for row in rows)), lr=0.01)
    hook.remove()
    counts = [state["steps"] for state in engine.optimizer.state.values() if "steps" in state]
    assert counts and all(type(count) is int for count in counts)
    return {
        "norm": done["actor/grad_norm"],
        "clipped": sum(squares) ** 0.5,
        "clip_grad": engine.deepspeed.optimizer.clip_grad,
        "counts": sorted(set(counts)),
    }


def save_old(engine: Engine, directory: str) -> None:
    """Save with the keys and types of a version that left clipping to DeepSpeed."""
    zero, states = engine.deepspeed.optimizer, engine.optimizer.state.values()
    counts = [state.get("steps") for state in states]
    for state in states:
        if "steps" in state:
            state["steps"] = torch.tensor(float(state["steps"]))
    zero.clip_grad = GRAD_CLIP
    engine.save(directory)
    zero.clip_grad = 0.0
    for state, count in zip(states, counts, strict=True):
        if count is not None:
            state["steps"] = count


def main() -> None:
    """Do what is asked."""
    model, stage, rendezvous, *actions = sys.argv[1:]
    keys = {"zero_optimization": {"stage": int(stage)}, "bf16": {"enabled": True}}
    engine = Engine(
        EngineSpec(model=model, optimizer=OptimizerConfig(lr=0.01, grad_clip=GRAD_CLIP), deepspeed=keys, rendezvous=rendezvous), 0
    )
    steps, left = [], iter(actions)
    for action in left:
        match action:
            case "step":
                steps.append(step(engine))
            case "save":
                engine.save(next(left))
            case "save-old":
                save_old(engine, next(left))
            case "load":
                engine.load(next(left))
    print("STEPS " + json.dumps(steps), flush=True)
    engine.close()
    os._exit(0)  # as in rank_program.py


main()
