"""Time a GRPO step against TRL's GRPOTrainer, and generation against transformers' `generate`, on this machine's CPU.

One architecture, the same weights and prompts to begin with, one process tree, rounds that alternate: each round times TRL's step,
transformers' generation, our generation and our step, so that whatever else the machine does falls on both sides. Ours runs as in the
pipeline: ranks as Ray actors, each an `Engine` under DeepSpeed, the head's EOS row silenced so that every sample has all its tokens.

Two threads that share busy cores wait for each other, which can make transformers tens of times slower than one thread. So theirs gets
the thread count that it generates fastest with at the start, not one that only an idle machine rewards; the count and the load are printed.

    python benchmarks/bench_grpo_cpu.py [--rounds 6] [--warmup 2] [--ranks 2] [--threads 1] [--their-threads 0]
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from grpo_setting import LEARNING_RATE, make_prompts, reward, write_model
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from trl_step import transformers_model, word_tokenizer

from domains.config import DomainConfig
from domains.types import Prompt, Sample, Verdict
from model.config import ModelConfig
from rl.advantages import group_advantages
from rl.config import GrpoConfig
from rl.job import GrpoJob
from rl.loop import update
from runtime import cluster
from runtime.cluster import RayGroup
from runtime.config import ClusterConfig, EngineConfig, EvaluationConfig, OptimizerConfig, SamplingConfig
from runtime.generation.conversation import prompt_tokens
from runtime.rollout import Rollout
from runtime.spec import EngineSpec
from runtime.step import DomainSetup, StepContext
from runtime.tracking import Tracker
from runtime.trainer import Trainer

PROMPTS, SAMPLES, PROMPT_TOKENS, NEW_TOKENS = 16, 8, 32, 32
CONFIG = ModelConfig(
    vocab_size=512, hidden_size=128, num_hidden_layers=4, num_attention_heads=4, head_dim=64, qk_rope_head_dim=16, q_lora_rank=64,
    o_groups=2, o_lora_rank=64, sliding_window=64, compress_ratios=[0, 4, 128, 4], index_n_heads=8, index_head_dim=32, index_topk=16,
    n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=128, num_hash_layers=1, hc_mult=4, hc_sinkhorn_iters=20,
    num_nextn_predict_layers=0, max_position_embeddings=4096,
)  # fmt: skip
NAMES = ("TRL step", "transformers generate", "our generate", "our step")


class Ours:
    """One GRPO trainer on ranks under Ray."""

    def __init__(self, directory: Path, prompts: Sequence[Prompt], *, ranks: int, threads: int) -> None:
        self.prompts, self.round = prompts, 0
        self.sampling = SamplingConfig(temperature=1.0, max_new_tokens=NEW_TOKENS)
        settings = ClusterConfig(ranks=ranks, threads_per_rank=threads, cpus_per_rank=0.5, dashboard=False)
        setup = DomainSetup(name="math", domain=DomainConfig(kind="math"), sampling=self.sampling)
        grpo = GrpoConfig(optimizer=OptimizerConfig(lr=LEARNING_RATE), steps=1000)
        self.job = GrpoJob(domain=setup, grpo=grpo, evaluation=EvaluationConfig(), start="model")
        self.context = StepContext(
            name="bench", workdir=directory, artifact=directory, inputs={}, tracker=Tracker(directory), cluster=settings,
            engine=EngineConfig(deepspeed={"zero_optimization": {"stage": 1}}, row_tokens=2560),
        )  # fmt: skip
        cluster.start(settings, directory)
        spec = EngineSpec(
            model=str(directory), optimizer=grpo.optimizer, deepspeed=self.context.engine.deepspeed, threads=threads, ranks=ranks,
            domains={"math": setup},
        )  # fmt: skip
        self.group = RayGroup(spec, name="bench", config=settings)
        self.trainer, self.rollout = Trainer(self.group, workdir=directory), Rollout(self.group)

    def generate(self) -> list[Sample]:
        """Sample one step's groups and see that every sample has all its tokens."""
        self.round += 1
        chosen = [self.prompts[(self.round * PROMPTS + i) % len(self.prompts)] for i in range(PROMPTS)]
        out = self.rollout.generate(chosen, self.sampling, samples=SAMPLES, stream=str(self.round))
        lengths = {(len(s.tokens), sum(s.sampled)) for s in out}
        assert len(out) == PROMPTS * SAMPLES and lengths == {(PROMPT_TOKENS + NEW_TOKENS, NEW_TOKENS)}, lengths
        return out

    def step(self) -> None:
        """Generate, grade, take one optimizer step."""
        samples = self.generate()
        verdicts = [Verdict(reward(s.tokens[PROMPT_TOKENS:]), "ok") for s in samples]
        advantages = group_advantages(verdicts, samples_per_prompt=SAMPLES)
        metrics = update(self.trainer, samples, advantages, context=self.context, job=self.job, step=0)
        assert metrics["targets"] == PROMPTS * SAMPLES * NEW_TOKENS, metrics
        assert metrics["mismatch_kl/mean"] < 1e-4, metrics

    def close(self) -> None:
        """End the ranks and Ray."""
        self.group.close()
        cluster.stop()


class Theirs:
    """TRL's trainer around transformers' model with the same weights; its tokenizer spells each id as a word."""

    def __init__(self, directory: Path, prompt_ids: list[list[int]]) -> None:
        self.model, self.tokenizer = transformers_model(directory), word_tokenizer(CONFIG.vocab_size)
        self.ids = torch.tensor(prompt_ids)
        self.workdir = directory / "trl"

    def generate(self) -> None:
        """Sample one step's groups with transformers."""
        batch = self.ids[:PROMPTS].repeat_interleave(SAMPLES, 0)
        self.model.eval()
        out = self.model.generate(
            batch, attention_mask=torch.ones_like(batch), max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=True
        )
        self.model.train()
        assert out.shape == (PROMPTS * SAMPLES, PROMPT_TOKENS + NEW_TOKENS), out.shape

    def fastest_threads(self) -> int:
        """Return the number of threads, up to the cores, that the second of two generations is fastest with."""
        seconds = {}
        for threads in range(1, (os.cpu_count() or 1) + 1):
            torch.set_num_threads(threads)
            for _ in range(2):
                began = time.perf_counter()
                self.generate()
                seconds[threads] = time.perf_counter() - began
        print("transformers generate by threads:", {threads: f"{s:.2f} s" for threads, s in seconds.items()}, flush=True)
        return min(seconds, key=lambda threads: seconds[threads])

    def train(self, steps: int, callback: TrainerCallback) -> None:
        """Run TRL's loop; `callback` does the rest of each round after a step."""
        prompts = [" ".join(f"<{token}>" for token in row) for row in self.ids.tolist()]
        settings = GRPOConfig(
            output_dir=str(self.workdir), per_device_train_batch_size=PROMPTS * SAMPLES, num_generations=SAMPLES, max_steps=steps,
            max_completion_length=NEW_TOKENS, generation_kwargs={"min_new_tokens": NEW_TOKENS}, learning_rate=LEARNING_RATE, beta=0.0,
            use_cpu=True, bf16=False, gradient_checkpointing=False, save_strategy="no", report_to=[], disable_tqdm=True,
            logging_strategy="no",
        )  # fmt: skip
        trainer = GRPOTrainer(
            model=self.model,
            reward_funcs=lambda completion_ids, **_: [reward(row) for row in completion_ids],
            args=settings,
            train_dataset=Dataset.from_dict({"prompt": prompts}),
            processing_class=self.tokenizer,
        )
        trainer.add_callback(callback)
        trainer.train()


class Round(TrainerCallback):
    """Times TRL's step, and lets the others have their turn after it."""

    def __init__(self, ours: Ours, theirs: Theirs, *, warmup: int) -> None:
        self.ours, self.theirs, self.warmup = ours, theirs, warmup
        self.seconds: dict[str, list[float]] = {name: [] for name in NAMES}
        self.began = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Start TRL's clock."""
        self.began = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Stop it and run the rest of the round."""
        took = [time.perf_counter() - self.began]
        for turn in (self.theirs.generate, self.ours.generate, self.ours.step):
            began = time.perf_counter()
            turn()
            took.append(time.perf_counter() - began)
        print(
            " | ".join(f"{name} {s:.3f} s" for name, s in zip(NAMES, took, strict=True)), "" if not self.warmup else "(warm-up)", flush=True
        )
        if self.warmup:
            self.warmup -= 1
            return
        for name, s in zip(NAMES, took, strict=True):
            self.seconds[name].append(s)


def report(seconds: dict[str, list[float]], *, parameters: int) -> str:
    """Lay out medians, tokens a second and the two ratios."""
    median = {name: statistics.median(values) for name, values in seconds.items()}
    tokens = PROMPTS * SAMPLES * NEW_TOKENS
    lines = [
        f"{parameters / 1e6:.2f}M parameters, {PROMPTS} prompts x {SAMPLES} samples x {NEW_TOKENS} new tokens, "
        f"median of {len(seconds[NAMES[0]])} alternating rounds, "
        f"load {os.getloadavg()[0]:.1f}, TRL on {torch.get_num_threads()} threads",
        f"{'':24}{'median s':>10}{'min s':>10}{'max s':>10}{'tokens/s':>10}",
    ]
    lines += [f"{name:24}{median[name]:10.3f}{min(v):10.3f}{max(v):10.3f}{tokens / median[name]:10.0f}" for name, v in seconds.items()]
    trl, generate, our_generate, our_step = (median[name] for name in NAMES)
    return "\n".join([*lines, f"GRPO step {trl / our_step:.1f} x faster, generation {generate / our_generate:.1f} x faster"])


def main() -> None:
    """Run the rounds and print the table."""
    parser = argparse.ArgumentParser(description="GRPO step and generation against TRL and transformers, on the CPU.")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="of each of our ranks")
    parser.add_argument("--their-threads", type=int, default=0, help="of the process with TRL; 0: whichever count is faster")
    arguments = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        tokenizer = write_model(directory, CONFIG)
        prompts = make_prompts(tokenizer, 16 * PROMPTS, tokens=PROMPT_TOKENS)
        theirs = Theirs(directory, [prompt_tokens(tokenizer, p.messages, "thinking") for p in prompts])
        torch.set_num_threads(arguments.their_threads or theirs.fastest_threads())
        ours = Ours(directory, prompts, ranks=arguments.ranks, threads=arguments.threads)
        rounds = Round(ours, theirs, warmup=arguments.warmup)
        theirs.train(arguments.warmup + arguments.rounds, rounds)
        ours.close()
        print(report(rounds.seconds, parameters=sum(p.numel() for p in theirs.model.parameters())))


if __name__ == "__main__":
    main()
