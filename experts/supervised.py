"""The supervised loop: next-token training on packed samples, for the base, the specialists' cold start and the warm-up."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from experts.config import SupervisedConfig
from runtime.batch import PackedSample, pack
from runtime.rollout import seed_of
from runtime.schedule import learning_rate
from runtime.spec import LossSpec
from runtime.step import StepContext
from runtime.trainer import Trainer


def train(context: StepContext, trainer: Trainer, samples: Sequence[PackedSample], config: SupervisedConfig) -> int:
    """Train on samples in a seeded order, epoch after epoch, from the last checkpoint on.

    Args:
        context: its tracker, engine settings and seed.
        trainer: the ranks.
        samples: what is trained on; step s of a seed always sees the same ones.
        config: budgets and optimizer.

    Returns:
        tokens trained on, over all attempts.
    """
    state = trainer.resume()
    context.tracker.resume_from(state["step"])
    cursor, tokens = state.get("cursor", 0), state.get("tokens", 0)
    for step in range(state["step"], config.steps):
        began = time.monotonic()
        cursor, chosen = take(samples, cursor, config.tokens_per_step, seed=seed_of(context.seed, context.name))
        rows = pack(chosen, row_tokens=context.engine.row_tokens, ranks=trainer.ranks)
        lr = learning_rate(step, config=config.optimizer, steps=config.steps)
        metrics = trainer.train_step(rows, loss_of_step(config, step), lr=lr, router_bias_speed=config.router_bias_speed)
        size = sum(len(row.tokens) for row in rows)
        tokens += size
        took = time.monotonic() - began
        context.tracker.log(step, metrics | {"perf/tokens_per_s": size / took, "time/train_s": took})
        context.tracker.progress(step + 1, config.steps, "training")
        if (step + 1) % config.save_every == 0 or step + 1 == config.steps:
            trainer.save(step + 1, {"cursor": cursor, "tokens": tokens})
    return tokens


def loss_of_step(config: SupervisedConfig, step: int) -> LossSpec:
    """Say what a step minimises: cross-entropy, and what the configuration adds for routers, MTP and indexers."""
    learns = config.indexer_loss_weight > 0
    return LossSpec(
        "experts.loss:cross_entropy",
        balance_weight=config.balance_loss_weight,
        mtp_weight=config.mtp_loss_weight,
        indexer_weight=config.indexer_loss_weight,
        indexer=("dense" if step < config.indexer_dense_steps else "sparse") if learns else "",
    )


def take(samples: Sequence[PackedSample], cursor: int, tokens: int, *, seed: int) -> tuple[int, list[PackedSample]]:
    """Take samples from position `cursor` of an endless, seeded sequence of epochs until they hold `tokens` tokens.

    Returns:
        the next position, and the samples (at least one).
    """
    chosen: list[PackedSample] = []
    size = 0
    order, epoch = np.empty(0, dtype=np.int64), -1
    while not chosen or size < tokens:
        if cursor // len(samples) != epoch:
            epoch = cursor // len(samples)
            order = np.random.default_rng([seed, epoch]).permutation(len(samples))
        chosen.append(samples[order[cursor % len(samples)]])
        size += len(chosen[-1].tokens)
        cursor += 1
    return cursor, chosen
