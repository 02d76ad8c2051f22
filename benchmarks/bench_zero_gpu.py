"""Train the `small` model under ZeRO 1, 2 and 3 on two GPUs beside one GPU: the same loss curve, and how much faster a step is.

Every run starts from the same weights and trains on the same rows: `STEPS` steps of 2 rows, then timed steps of 2 and of 4 rows, then a few
greedy answers, for which ZeRO 3 gathers the weights. How far rounding alone parts two curves is told by a second run on one GPU whose rows
hold the same samples in another order. Each rank is a process of its own that sees one GPU, as under Ray; ranks meet over NCCL. All
processes come up at once; then the runs take turns.

    python benchmarks/bench_zero_gpu.py [--stages 1 3 2]
    python benchmarks/bench_zero_gpu.py --tiny    the tiny model on a CPU over gloo, in bf16 too, to check the program
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import yaml

ROOT = Path(__file__).resolve().parent.parent
STEPS, TIMED = 8, 4
LENGTH = 512
"""Tokens of a sample."""
LEARNING_RATE, WARMUP_STEPS = 1e-3, 4


@dataclass(frozen=True)
class Task:
    """What a rank is told.

    Attributes:
        model: directory of the weights to start from.
        rendezvous: where the ranks meet.
        stage: of ZeRO.
        rank, ranks: which of how many.
        row_tokens: of a packed row.
        gpu: number of the one it sees, "" for a CPU.
        reordered: rows hold their samples in reverse order.
    """

    model: str
    rendezvous: str
    stage: int
    rank: int
    ranks: int
    row_tokens: int
    gpu: str
    reordered: bool


@dataclass
class Outcome:
    """What a run came to.

    Attributes:
        name: of the run.
        losses: mean loss of each of the first steps, nats a token.
        seconds: of a timed step, by its number of rows.
        row_tokens: of a row.
        peak_gib: most memory that a rank allocated.
        answers: token ids of the greedy samples after the last step.
    """

    name: str
    losses: list[float]
    seconds: dict[int, float]
    row_tokens: int
    peak_gib: float
    answers: list[list[int]]


def rows_of(task: Task, count: int, *, step: int) -> list[Any]:
    """Make `count` rows for a step: sequences that repeat a short piece of their own, so that there is something to learn."""
    from runtime.batch import PackedSample, pack

    draw = np.random.default_rng(step)
    length = min(LENGTH, task.row_tokens // 2)
    rows = []
    for _ in range(count):
        pieces = [draw.integers(20, 60, size=int(draw.integers(3, 17))) for _ in range(task.row_tokens // length)]
        samples = [PackedSample(np.resize(piece, length).tolist(), [False] + [True] * (length - 1)) for piece in pieces]
        rows += pack(samples[::-1] if task.reordered else samples, row_tokens=task.row_tokens)
    assert len(rows) == count, len(rows)
    return rows


def run_rank(task: Task) -> None:
    """Be one rank: come up, then obey `curve`, `time` and `sample` from standard input, answering each with a line of JSON."""
    os.environ["DS_ACCELERATOR"] = "cuda" if task.gpu else "cpu"  # read by deepspeed on import
    if task.gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = task.gpu
    import torch

    engine = start(task)
    say({"up": True})
    for line in sys.stdin:
        match line.strip():
            case "curve":
                say({"losses": [step_on(engine, task, rows_of(task, 2, step=i), step=i) for i in range(STEPS)]})
            case "time":
                say({"seconds": {rows: seconds_a_step(engine, task, rows) for rows in (2, 4)}})
            case "sample":
                peak = torch.cuda.max_memory_allocated() / 2**30 if task.gpu else 0.0
                say({"answers": sample(engine, task), "peak_gib": peak})
                break
    engine.close()
    # Gloo's threads may still drop the last collective's tensors; while the interpreter shuts down that aborts the process.
    os._exit(0)


def start(task: Task) -> Any:
    """Bring the engine up."""
    from domains.config import DomainConfig
    from runtime.config import OptimizerConfig, SamplingConfig
    from runtime.engine import Engine
    from runtime.spec import EngineSpec
    from runtime.step import DomainSetup

    zero: dict[str, Any] = {"stage": task.stage}
    if not task.gpu and task.stage == 3:
        # Gloo has no reduce-scatter; and parameters as small as the tiny model's would never be cut up, which is what there is to check.
        zero |= {"reduce_scatter": False, "stage3_param_persistence_threshold": 0}
    sampling = SamplingConfig(temperature=0.0, max_new_tokens=16)
    spec = EngineSpec(
        model=task.model, optimizer=OptimizerConfig(lr=LEARNING_RATE), threads=4 if task.gpu else 1, ranks=task.ranks,
        deepspeed={"zero_optimization": zero, "bf16": {"enabled": True}}, rendezvous=task.rendezvous,
        domains={"math": DomainSetup(name="math", domain=DomainConfig(kind="math"), sampling=sampling)},
    )  # fmt: skip
    return Engine(spec, task.rank)


def step_on(engine: Any, task: Task, batches: list[Any], *, step: int) -> float:
    """Train one step on rows that are dealt to all ranks; returns this rank's share of the mean loss."""
    from runtime.batch import split
    from runtime.spec import LossSpec

    targets = float(sum(batch.target_count for batch in batches))
    loss = LossSpec("experts.loss:cross_entropy", balance_weight=1e-4)
    lr = LEARNING_RATE * min(1.0, (step + 1) / WARMUP_STEPS)
    sums, _ = engine.train_step(split(batches, task.ranks)[task.rank], loss, targets, lr=lr, router_bias_speed=1e-3)
    return sums["loss"] / targets


def seconds_a_step(engine: Any, task: Task, rows: int) -> float:
    """Return the median time of a step, every GPU finished, after one that does not count."""
    import torch

    seconds = []
    for turn in range(STEPS, STEPS + TIMED + 1):
        batches = rows_of(task, rows, step=turn)
        began = time.perf_counter()
        step_on(engine, task, batches, step=turn)
        if task.gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return median(seconds[1:])


def sample(engine: Any, task: Task) -> list[list[int]]:
    """Return greedy answers of this rank's share of four prompts, token ids; every rank gathers the weights."""
    from domains.types import Prompt
    from runtime.config import SamplingConfig

    prompts = [Prompt(f"math/train/{i}", "math", [{"role": "user", "content": f"{i} + {i} = "}], {}) for i in range(4)]
    mine = prompts[4 * task.rank // task.ranks : 4 * (task.rank + 1) // task.ranks]
    answers = engine.generate(mine, [0] * len(mine), SamplingConfig(temperature=0.0, max_new_tokens=16), samples=1)
    return [answer.tokens for answer in answers]


def say(message: dict[str, Any]) -> None:
    """Answer the driver."""
    print("ZERO " + json.dumps(message), flush=True)


class Run:
    """The processes of one run, and what they say."""

    def __init__(self, name: str, tasks: Sequence[Task]) -> None:
        self.name, self.row_tokens = name, tasks[0].row_tokens
        path = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
        self.said: list[list[str]] = [[] for _ in tasks]
        self.processes = [
            subprocess.Popen(
                [sys.executable, __file__, "--task", json.dumps(asdict(task))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                bufsize=1,
                env=os.environ | {"PYTHONPATH": path},
            )
            for task in tasks
        ]

    def tell(self, command: str) -> None:
        """Tell every rank."""
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(command + "\n")

    def hear(self) -> list[dict[str, Any]]:
        """Wait for every rank's answer.

        Raises:
            RuntimeError: a rank ended instead; holds the end of what it printed.
        """
        answers = []
        for rank, (process, said) in enumerate(zip(self.processes, self.said, strict=True)):
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("ZERO "):
                    answers.append(json.loads(line[5:]))
                    break
                said.append(line)
            else:
                raise RuntimeError(f"{self.name}: rank {rank} ended:\n{''.join(said)[-3000:]}")
        return answers

    def outcome(self) -> Outcome:
        """Let the ranks train, be timed and sample."""
        self.tell("curve")
        losses = [sum(shares) for shares in zip(*(answer["losses"] for answer in self.hear()), strict=True)]
        self.tell("time")
        timed = [answer["seconds"] for answer in self.hear()]
        self.tell("sample")
        last = self.hear()
        return Outcome(
            name=self.name,
            losses=losses,
            seconds={int(rows): max(part[rows] for part in timed) for rows in timed[0]},
            row_tokens=self.row_tokens,
            peak_gib=max(answer["peak_gib"] for answer in last),
            answers=[tokens for answer in last for tokens in answer["answers"]],
        )

    def close(self) -> None:
        """End the processes."""
        for process in self.processes:
            process.kill()
            process.wait()


def compare(stages: Sequence[int], *, tiny: bool) -> list[Outcome]:
    """Run one rank at ZeRO 1, the same with its samples reordered, then two ranks at each stage.

    Raises:
        RuntimeError: ranks of some runs ended. Where those of the first did, no other has run; otherwise the others have, and are printed.
    """
    with tempfile.TemporaryDirectory() as temporary:
        model = write_model(Path(temporary) / "model", "tiny" if tiny else "small")

        def run(name: str, stage: int, ranks: int, *, reordered: bool = False) -> Run:
            common = {"model": str(model), "rendezvous": f"file://{temporary}/{name.replace(' ', '-')}", "stage": stage, "ranks": ranks}
            common |= {"row_tokens": 512 if tiny else 16384, "reordered": reordered}
            # One GPU's second run sits on the other GPU: what an idle process has cached must leave room for the one at work.
            return Run(name, [Task(rank=rank, gpu="" if tiny else str(rank + reordered), **common) for rank in range(ranks)])

        runs = [run("1 rank", 1, 1), run("1 rank, reordered", 1, 1, reordered=True)]
        runs += [run(f"2 ranks, ZeRO {stage}", stage, 2) for stage in stages]
        outcomes: list[Outcome] = []
        failures = []
        began = time.perf_counter()
        try:
            for each in runs:
                each.hear()
            print(f"every rank is up after {time.perf_counter() - began:.0f} s", flush=True)
            for each in runs:
                try:
                    outcomes.append(each.outcome())
                except RuntimeError as error:
                    if not outcomes:
                        raise  # there is nothing to compare the others with
                    failures.append(str(error))
                else:
                    print(line_of(outcomes[-1], outcomes[0]), flush=True)
                each.close()
        finally:
            for each in runs:
                each.close()
        if failures:
            raise RuntimeError("\n\n".join(failures))
        return outcomes


def gpus() -> int:
    """Count this machine's GPUs."""
    import torch  # here, because a rank chooses its GPU before torch is loaded

    return torch.cuda.device_count()


def write_model(directory: Path, name: str) -> Path:
    """Write a fresh model of conf/model/`name`.yaml and a tokenizer of bytes."""
    from experts.fresh import write_fresh_model
    from model.config import ModelConfig
    from model.tokenizer import Tokenizer

    values = yaml.safe_load((ROOT / f"conf/model/{name}.yaml").read_text())
    del values["defaults"]
    write_fresh_model(directory, ModelConfig(**values), Tokenizer.train(["0 1 2 3"], 300), seed=0)
    return directory


def distance(outcome: Outcome, one: Outcome) -> float:
    """Return how far two curves part at most, nats a token."""
    return max(abs(a - b) for a, b in zip(outcome.losses, one.losses, strict=True))


def line_of(outcome: Outcome, one: Outcome) -> str:
    """Lay out one run beside the one rank's."""
    apart = distance(outcome, one)
    speed = "".join(f"{s:9.3f}{rows * outcome.row_tokens / s:10.0f}{one.seconds[rows] / s:7.2f}x" for rows, s in outcome.seconds.items())
    same = sum(a == b for a, b in zip(outcome.answers, one.answers, strict=True))
    return (
        f"{outcome.name:20}{outcome.losses[0]:9.4f}{outcome.losses[-1]:9.4f}{apart:11.5f}{speed}"
        f"{outcome.peak_gib:9.1f}{same:6}/{len(one.answers)}"
    )


def main() -> None:
    """Compare and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 3, 2])
    parser.add_argument("--tiny", action="store_true", help="the tiny model in fp32 on a CPU")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.task:
        return run_rank(Task(**json.loads(arguments.task)))
    if not arguments.tiny and (found := gpus()) < 2:
        parser.error(f"found {found} GPUs, expected two; --tiny checks the program on a CPU")
    began = time.perf_counter()
    outcomes = compare(arguments.stages, tiny=arguments.tiny)
    print(f"\nall in {time.perf_counter() - began:.0f} s; rows of {outcomes[0].row_tokens} tokens; losses in nats a token")
    steps = "".join(f"{f'{rows} rows s':>9}{'tokens/s':>10}{'':8}" for rows in outcomes[0].seconds)
    print(f"{'':20}{'first':>9}{'last':>9}{'max diff.':>11}{steps}{'peak GiB':>9} same answers")
    print("\n".join(line_of(outcome, outcomes[0]) for outcome in outcomes))
    for outcome in outcomes:
        print(f"{outcome.name:20}" + "".join(f"{loss:9.4f}" for loss in outcome.losses))


if __name__ == "__main__":
    main()
