"""Turn a configuration into steps: the only file that sees all stages of the recipe."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distill.job import DistillJob
from experts.job import AdoptJob, PretrainJob, SftJob
from pipeline.artifacts import digest
from pipeline.config import RunConfig, architecture
from rl.job import GrpoJob
from runtime.step import DomainSetup, StepContext

RECIPE = {"base": 2, "sft": 2, "grpo": 2, "warmup": 2, "distill": 2}
"""Raise a kind's number when its code changes what it makes: artifacts of older numbers are then not reused."""

NOT_IN_KEY = {"save_every"}
"""Fields of a job that cannot change its result."""


@dataclass(frozen=True)
class Step:
    """One node of the graph.

    Attributes:
        name: unique in a run, `grpo-math`.
        kind: `base`, `sft`, `grpo`, `warmup` or `distill`.
        needs: names of the steps whose artifacts it reads.
        run: `(context, job) -> summary`.
        job: what it is to do; a dataclass of its layer.
        recipe: what the key digests.
        key: digest of everything that can change the result, the keys of its inputs included.
    """

    name: str
    kind: str
    needs: tuple[str, ...]
    run: Callable[[StepContext, Any], dict[str, Any]]
    job: Any
    recipe: dict[str, Any]
    key: str


# Imported inside: the loops load torch, which planning must not wait for.
def _pretrain(context: StepContext, job: PretrainJob) -> dict[str, Any]:
    from experts.pretrain import run

    return run(context, job)


def _adopt(context: StepContext, job: AdoptJob) -> dict[str, Any]:
    from experts.adopt import run

    return run(context, job)


def _sft(context: StepContext, job: SftJob) -> dict[str, Any]:
    from experts.sft import run

    return run(context, job)


def _grpo(context: StepContext, job: GrpoJob) -> dict[str, Any]:
    from rl.loop import run

    return run(context, job)


def _distill(context: StepContext, job: DistillJob) -> dict[str, Any]:
    from distill.loop import run

    return run(context, job)


def steps(config: RunConfig) -> list[Step]:
    """List the steps of `config.stage` and everything they need, each after its needs.

    base -> {sft-D -> grpo-D for every domain D}; base -> warmup; {warmup or base, grpo-*} -> distill. The base is trained, or the
    checkpoint of `model.path`.
    """
    graph = _Graph(config)
    setups = {name: DomainSetup(name=name, domain=s.domain, sampling=s.sampling) for name, s in config.domains.items()}
    if config.model.path:
        graph.add("base", _adopt, AdoptJob(path=str(Path(config.model.path).resolve()), domains=setups, evaluation=config.evaluation))
    else:
        model = architecture(config.model)
        graph.add("base", _pretrain, PretrainJob(model=model, domains=setups, supervised=config.base, evaluation=config.evaluation))
    if config.stage == "base":
        return graph.steps
    for name, specialist in config.domains.items():
        sft = SftJob(domains={name: setups[name]}, supervised=specialist.sft, evaluation=config.evaluation)
        graph.add(f"sft-{name}", _sft, sft, needs=("base",))
    for name, specialist in config.domains.items():
        others = {other: setup for other, setup in setups.items() if other != name}
        grpo = GrpoJob(domain=setups[name], grpo=specialist.grpo, evaluation=config.evaluation, start=f"sft-{name}", others=others)
        graph.add(f"grpo-{name}", _grpo, grpo, needs=(f"sft-{name}",))
    if config.stage == "experts":
        return graph.steps
    start = config.distill.init
    if start == "warmup":
        graph.add("warmup", _sft, SftJob(domains=setups, supervised=config.warmup, evaluation=config.evaluation), needs=("base",))
    teachers = {name: f"grpo-{name}" for name in config.domains}
    job = DistillJob(domains=setups, distill=config.distill, evaluation=config.evaluation, start=start, teachers=teachers)
    graph.add("distill", _distill, job, needs=(start, *teachers.values()))
    return graph.steps


class _Graph:
    """Steps in the order they were added, with their keys."""

    def __init__(self, config: RunConfig) -> None:
        self._keys: dict[str, str] = {}
        self._common = {"seed": config.seed, "numerics": _numerics(config)}
        self.steps: list[Step] = []

    def add(self, name: str, run: Callable[[StepContext, Any], dict[str, Any]], job: Any, *, needs: tuple[str, ...] = ()) -> None:
        """Append a step whose needs were added before."""
        kind = name.split("-")[0]
        recipe = {
            "step": name,
            "version": RECIPE[kind],
            **self._common,
            "job": _relevant(job),
            "inputs": {need: self._keys[need] for need in needs},
        }
        self._keys[name] = digest(recipe)
        self.steps.append(Step(name, kind, needs, run, job, recipe, self._keys[name]))


def _numerics(config: RunConfig) -> dict[str, Any]:
    """Keep what of engine and sandbox can change a result: precision, and the limits that decide a verdict."""
    precision: dict[str, Any] = {name: config.engine.deepspeed[name] for name in ("bf16", "fp16") if name in config.engine.deepspeed}
    quantization = asdict(config.engine.quantization)
    if any(quantization.values()):
        precision["quantization"] = quantization
    return precision | {"sandbox_timeout_s": config.sandbox.timeout_s, "sandbox_memory_mib": config.sandbox.memory_mib}


def _relevant(job: Any) -> Any:
    return _without(asdict(job))


def _without(node: Any) -> Any:
    if isinstance(node, dict):
        kept = {name: _without(value) for name, value in node.items() if name not in NOT_IN_KEY}
        source = Path(str(node["source"])) if "source" in node else None
        if source is not None and source.suffix in (".jsonl", ".parquet"):
            kept["source"] = f"{source.name} sha256 {hashlib.sha256(source.read_bytes()).hexdigest()}"
        if "path" in node:
            kept["path"] = _fingerprint(Path(node["path"]))
        return kept
    return [_without(value) for value in node] if isinstance(node, list | tuple) else node


HEAD_BYTES = 1 << 20
"""Bytes of each file of a checkpoint that its fingerprint reads: reading all of a real one would take longer than planning may."""


def _fingerprint(directory: Path) -> dict[str, str]:
    """Tell a checkpoint from another: name, size, time of the last change and the first MiB of each of its files."""
    found = {}
    for file in sorted(path for path in directory.iterdir() if path.is_file()):
        stat = file.stat()
        with file.open("rb") as stream:
            found[file.name] = f"{stat.st_size} {stat.st_mtime_ns} {hashlib.sha256(stream.read(HEAD_BYTES)).hexdigest()}"
    return found
