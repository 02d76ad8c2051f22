"""Time rollout, GRPO step and supervised training of the `small` model on one GPU, the step beside TRL's GRPOTrainer.

The architecture of conf/model/small.yaml without its MTP block, the same weights and prompts to begin with, bf16, rounds that alternate: a
round is one step of TRL and several generations and steps of ours. Ours runs as in the pipeline: one rank as a Ray actor, an `Engine` under
DeepSpeed's ZeRO 1 with Muon, the head's EOS row silenced so that every sample has all its tokens. TRL drives transformers' model, loaded in
bf16 without autocast, which is the faster way for it; it generates all samples at once and trains on them in `accumulate` parts.

Then supervised batches: forward, backward and optimizer, one step right behind the other as in the pipeline's loops, where a GPU finishes
one while the next is on its way to it; a step's time is that between two returns. MFU counts 6 FLOPs a token and active parameter
(attention's projections, the chosen and the shared expert, router, compressors, mHC's maps, head; not the embedding, no MTP) against the
data sheet's peak; beside it the same with core attention's products, and MFU against an 8192^3 product measured here. With --profile, where
a supervised step's time goes.

    python benchmarks/bench_grpo_gpu.py [--rounds 2] [--rows 512] [--row-tokens 32768] [--skip-trl] [--profile]
    python benchmarks/bench_grpo_gpu.py --tiny    on a CPU in fp32, to check the program
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import torch
from grpo_setting import LEARNING_RATE, Setting, architecture, make_prompts, reward, write_model
from grpo_table import Clock, report
from step_profile import profile_step

from domains.config import DomainConfig
from domains.types import Prompt, Sample, Verdict
from rl.advantages import group_advantages
from rl.config import GrpoConfig
from rl.job import GrpoJob
from rl.loop import update
from runtime import cluster
from runtime.batch import Batch, PackedSample, pack
from runtime.cluster import RayGroup
from runtime.config import ClusterConfig, EngineConfig, EvaluationConfig, OptimizerConfig, SamplingConfig
from runtime.generation.conversation import prompt_tokens
from runtime.rollout import Rollout
from runtime.spec import EngineSpec, LossSpec
from runtime.step import DomainSetup, StepContext
from runtime.tracking import Tracker
from runtime.trainer import Trainer

if TYPE_CHECKING:
    from trl_step import TrlGrpo

OURS_A_ROUND = 3
TRAINED = LossSpec("experts.loss:cross_entropy", balance_weight=1e-4)


def settled(_: Any = None) -> int:
    """Wait for this process's GPU; returns the most bytes it had allocated since the last time."""
    if not torch.cuda.is_available():
        return 0
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return peak


class Ours:
    """One GRPO trainer on one rank under Ray."""

    def __init__(self, directory: Path, prompts: Sequence[Prompt], setting: Setting) -> None:
        self.prompts, self.setting, self.round = prompts, setting, 0
        self.sampling = SamplingConfig(temperature=1.0, max_new_tokens=setting.new_tokens, rows=setting.rows)
        gpu = setting.device == "cuda"
        ranks = ClusterConfig(cpus_per_rank=4 if gpu else 0.5, threads_per_rank=4 if gpu else 1, gpus_per_rank=float(gpu), dashboard=False)
        setup = DomainSetup(name="math", domain=DomainConfig(kind="math"), sampling=self.sampling)
        grpo = GrpoConfig(optimizer=OptimizerConfig(lr=LEARNING_RATE), steps=1000)
        self.job = GrpoJob(domain=setup, grpo=grpo, evaluation=EvaluationConfig(), start="model")
        self.context = StepContext(
            name="bench", workdir=directory, artifact=directory, inputs={}, tracker=Tracker(directory), cluster=ranks,
            engine=EngineConfig(deepspeed=setting.deepspeed, row_tokens=setting.row_tokens),
        )  # fmt: skip
        cluster.start(ranks, directory)
        spec = EngineSpec(
            model=str(directory), optimizer=grpo.optimizer, deepspeed=setting.deepspeed, threads=ranks.threads_per_rank,
            domains={"math": setup},
        )  # fmt: skip
        self.group = RayGroup(spec, name="bench", config=ranks)
        self.trainer, self.rollout = Trainer(self.group, workdir=directory), Rollout(self.group)
        self.shares: list[tuple[float, float, float]] = []
        self.mismatch = 0.0

    def settled(self) -> int:
        """Call `settled` in the rank's process."""
        return ray.get(self.group._actors[0].__ray_call__.remote(settled))

    def rollout_alone(self) -> int:
        """Generate, and see that nothing is left to do."""
        self.generate()
        return self.settled()

    def generate(self) -> list[Sample]:
        """Sample one step's groups and see that every sample has all its tokens."""
        self.round += 1
        count, setting = self.setting.prompts, self.setting
        chosen = [self.prompts[(self.round * count + i) % len(self.prompts)] for i in range(count)]
        out = self.rollout.generate(chosen, self.sampling, samples=setting.samples, stream=str(self.round))
        lengths = {(len(s.tokens), sum(s.sampled)) for s in out}
        expected = {(setting.prompt_tokens + setting.new_tokens, setting.new_tokens)}
        assert len(out) == count * setting.samples and lengths == expected, lengths
        return out

    def step(self) -> int:
        """Generate, grade, take one optimizer step."""
        times = [time.perf_counter()]
        samples = self.generate()
        times.append(time.perf_counter())
        verdicts = [Verdict(reward(s.tokens[self.setting.prompt_tokens :]), "ok") for s in samples]
        advantages = group_advantages(verdicts, samples_per_prompt=self.setting.samples)
        times.append(time.perf_counter())
        metrics = update(self.trainer, samples, advantages, context=self.context, job=self.job, step=0)
        peak = self.settled()
        times.append(time.perf_counter())
        assert metrics["targets"] == self.setting.sampled, metrics
        self.mismatch = max(self.mismatch, metrics["mismatch_kl/mean"])
        self.shares.append((times[1] - times[0], times[2] - times[1], times[3] - times[2]))
        return peak

    def rows(self, tokens: int) -> list[Batch]:
        """Return a supervised batch of `tokens` tokens, drawn at random."""
        generator = torch.Generator().manual_seed(2)
        length, vocabulary = self.setting.length, self.setting.config.vocab_size
        drawn = torch.randint(5, vocabulary, (tokens // length, length), generator=generator).tolist()
        return pack([PackedSample(row, [False] + [True] * (length - 1)) for row in drawn], row_tokens=self.setting.row_tokens)

    def supervised(self, clock: Clock, tokens: int) -> None:
        """Time steps on a supervised batch of `tokens` tokens, forward, backward and optimizer, each until the loop could go on."""
        rows, name = self.rows(tokens), f"supervised {tokens}"

        def step() -> int:
            self.trainer.train_step(rows, TRAINED, lr=LEARNING_RATE, router_bias_speed=1e-3)
            return 0

        for turn in range(2 + 2 * OURS_A_ROUND):
            clock.measure(name, step, counts=turn > 1)
        clock.peaks[name] = self.settled()

    def profile(self, tokens: int) -> str:
        """Say where the time of such a step goes in the rank's process."""
        return ray.get(self.group._actors[0].__ray_call__.remote(profile_step, self.rows(tokens), loss=TRAINED, lr=LEARNING_RATE))

    def close(self) -> None:
        """End the rank and Ray."""
        self.group.close()
        cluster.stop()


class Rounds:
    """Alternates: a step of TRL where it takes part, then ours; the first round only warms up."""

    def __init__(self, ours: Ours, clock: Clock) -> None:
        self.ours, self.clock, self.done = ours, clock, 0
        self.began = 0.0

    def run(self, count: int, theirs: TrlGrpo | None) -> None:
        """Run `count` rounds; TRL's loop calls back where it has the lead."""
        if theirs is not None:
            theirs.train(count, reward=reward, before=self.start_clock, after=self.after_trl)
        while self.done < count:
            self.our_turn()

    def start_clock(self) -> None:
        """Start the clock for TRL's step."""
        settled()
        self.began = time.perf_counter()

    def after_trl(self) -> None:
        """Stop it, and take our turn."""
        peak = settled()
        self.clock.note("TRL step", time.perf_counter() - self.began, peak, counts=self.done > 0)
        self.our_turn()

    def our_turn(self) -> None:
        """Generate and step."""
        for _ in range(OURS_A_ROUND if self.done else 1):
            self.clock.measure("our rollout", self.ours.rollout_alone, counts=self.done > 0)
            self.clock.measure("our step", self.ours.step, counts=self.done > 0)
        if not self.done:
            self.ours.shares.clear()
        self.done += 1


def read_setting(arguments: argparse.Namespace) -> Setting:
    """Return what is timed: the `small` model, or the tiny one on a CPU."""
    setting = Setting(architecture("small"), rows=arguments.rows, row_tokens=arguments.row_tokens)
    if not arguments.tiny:
        return setting
    return replace(
        setting, config=architecture("tiny"), prompts=4, samples=4, prompt_tokens=32, new_tokens=8, rows=16, row_tokens=1024,
        accumulate=2, batches=(1024, 2048, 4096), length=256, device="cpu",
    )  # fmt: skip


def bench(arguments: argparse.Namespace) -> None:
    """Run everything and print the table, and the profile where it is wanted."""
    setting, began = read_setting(arguments), time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        directory, clock = Path(temporary), Clock()
        tokenizer = write_model(directory, setting.config)
        prompts = make_prompts(tokenizer, 2 * setting.prompts, tokens=setting.prompt_tokens)
        ids = [prompt_tokens(tokenizer, p.messages, "thinking") for p in prompts]
        theirs = None
        if not arguments.skip_trl:
            from trl_step import TrlGrpo  # takes seconds

            theirs = TrlGrpo(directory, ids, setting)
        print(f"model and prompts after {time.perf_counter() - began:.0f} s", flush=True)
        ours = Ours(directory, prompts, setting)
        print(f"our rank after {time.perf_counter() - began:.0f} s", flush=True)
        Rounds(ours, clock).run(arguments.rounds + 1, theirs)
        for tokens in setting.batches:
            ours.supervised(clock, tokens)
        profiled = "\n" + ours.profile(setting.batches[1]) if arguments.profile else ""
        ours.close()
        print(f"all in {time.perf_counter() - began:.0f} s", flush=True)
        print(report(clock, setting, ours.shares, mismatch_nats=ours.mismatch) + profiled)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2, help="measured rounds, after one that warms up")
    parser.add_argument("--rows", type=int, default=512, help="samples decoded at once")
    parser.add_argument("--row-tokens", type=int, default=32768, help="tokens of a packed row")
    parser.add_argument("--skip-trl", action="store_true")
    parser.add_argument("--profile", action="store_true", help="say where the time of a supervised step goes")
    parser.add_argument("--tiny", action="store_true", help="conf/model/tiny.yaml in fp32 on a CPU: to check the program")
    arguments = parser.parse_args()
    if not arguments.tiny and not torch.cuda.is_available():
        parser.error("no GPU here; --tiny checks the program on a CPU")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    bench(arguments)


if __name__ == "__main__":
    main()
