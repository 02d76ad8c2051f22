"""Compose YAML and command line into one typed configuration; everything invalid dies here, before Ray starts."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from distill.config import DistillConfig
from domains.config import DomainConfig, SandboxConfig
from experts.config import SupervisedConfig
from model.checkpoints.settings import check_tokenizer, read_config
from model.config import AnyConfig, ArchitectureConfig, ModelConfig, V32Config, parse_config
from pipeline.errors import UsageError, choose, unknown_key
from rl.config import GrpoConfig
from runtime.config import ClusterConfig, EngineConfig, EvaluationConfig, SamplingConfig, TrackingConfig

CONF = Path(__file__).resolve().parent.parent / "conf"
STAGES = ("base", "experts", "distill", "all")
DOMAIN_KINDS = ("math", "code", "agent")
KERNELS = ("auto", "triton", "reference")


@dataclass(kw_only=True)
class SpecialistConfig:
    """One domain and how its specialist is cultivated."""

    domain: DomainConfig = MISSING
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    sft: SupervisedConfig = field(default_factory=SupervisedConfig)
    grpo: GrpoConfig = field(default_factory=GrpoConfig)


@dataclass(kw_only=True)
class V4Model(ModelConfig):
    """The `model` group of a V4."""

    path: str = ""
    """A checkpoint's directory: it is then the base, with its own configuration and tokenizer, and the other keys do not count."""


@dataclass(kw_only=True)
class V32Model(V32Config):
    """The `model` group of a V3.2."""

    path: str = ""
    """A checkpoint's directory, as for a V4."""


@dataclass(kw_only=True)
class RunConfig:
    """One run: what it makes, from what, and with which resources."""

    stage: str = MISSING
    """`base`, `experts`, `distill` or `all`; what it needs is made too, or reused."""
    run: str | None = None
    """Name of the run directory; the stage's name when left out."""
    output_dir: str = "outputs"
    seed: int = 0
    model: Any = MISSING
    """`V4Model` or `V32Model`; the file of the group says which."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    sandbox: SandboxConfig = field(default_factory=SandboxConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    domains: dict[str, SpecialistConfig] = field(default_factory=dict)
    base: SupervisedConfig = field(default_factory=SupervisedConfig)
    warmup: SupervisedConfig = field(default_factory=SupervisedConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)


def register() -> None:
    """Make the schema known to Hydra under the name that `conf/config.yaml` starts from; idempotent."""
    ConfigStore.instance().store(name="schema", node=RunConfig)
    for schema in (V4Model, V32Model):
        ConfigStore.instance().store(group="model", name=schema.model_type, node=schema)


def example() -> DictConfig:
    """Compose the whole schema, with every domain of `conf/domain`, so that an unknown key finds its nearest."""
    domains = {path.stem: SpecialistConfig(domain=DomainConfig(kind=path.stem)) for path in (CONF / "domain").glob("*.yaml")}
    schema = OmegaConf.structured(RunConfig(stage="all", model=V4Model(), domains=domains))
    assert isinstance(schema, DictConfig)
    return schema


def convert(composed: DictConfig) -> RunConfig:
    """Turn Hydra's configuration into dataclasses and check what no single field can know.

    Args:
        composed: what Hydra composed over the schema.

    Raises:
        UsageError: all missing values and contradictions at once, one a line.
    """
    if strangers := _strangers("", composed):
        raise UsageError("\n".join(unknown_key(key, value, conf=CONF, schema=example()) for key, value in strangers))
    missing = OmegaConf.missing_keys(composed)
    if missing:
        raise UsageError("\n".join(_missing(key) for key in sorted(missing)))
    config = OmegaConf.to_object(composed)
    assert isinstance(config, RunConfig)
    if found := problems(config):
        raise UsageError("\n".join(found))
    return config


def run_name(config: RunConfig) -> str:
    """Name of the run's directory, the same for the same command."""
    return config.run or config.stage


def problems(config: RunConfig) -> list[str]:
    """List every contradiction, as `key: got, expected`; empty when the run can start."""
    found = [] if config.stage in STAGES else [choose("stage", config.stage, STAGES)]
    if not re.fullmatch(r"[\w][\w.,=+-]*", run_name(config)):
        found.append(f"run: got {run_name(config)!r}, expected letters, digits and . , = + - _")
    found += _model_problems(config.model)
    found += _out_of_range("", config)
    if config.engine.quantization.kv and isinstance(config.model, V32Model) and not config.model.path:
        found.append("engine.quantization.kv: got true, expected false: only V4's cache has this grid")
    if config.engine.kernels not in KERNELS:
        found.append(choose("engine.kernels", config.engine.kernels, KERNELS))
    elif config.engine.kernels == "triton" and not config.cluster.gpus_per_rank:
        found.append("engine.kernels: got 'triton', but cluster.gpus_per_rank is 0 and Triton needs a GPU; expected auto or reference")
    if config.tracking.wandb not in ("offline", "online", "off"):
        found.append(choose("tracking.wandb", config.tracking.wandb, ("offline", "online", "off")))
    if config.sandbox.backend not in ("auto", "bwrap", "bwrap-clone-filter"):
        found.append(choose("sandbox.backend", config.sandbox.backend, ("auto", "bwrap", "bwrap-clone-filter")))
    if not config.domains:
        found.append("domains: got none, expected at least one")
    for name, specialist in config.domains.items():
        found += _domain_problems(name, specialist, config)
    return found + _distill_problems(config) + _mtp_problems(config)


def architecture(model: V4Model | V32Model) -> AnyConfig:
    """Return the architecture that the `model` group describes, without what only the pipeline reads."""
    return parse_config({name: value for name, value in model.to_dict().items() if name != "path"})


def _model_problems(model: V4Model | V32Model) -> list[str]:
    if not model.path:
        return [f"model.{problem}" for problem in model.problems()]
    found = [
        f"model.path: got {model.path!r}, which holds no {name}; expected a directory with a checkpoint and its tokenizer"
        for name in ("config.json", "tokenizer.json")
        if not (Path(model.path) / name).is_file()
    ]
    if not found:
        try:
            check_tokenizer(Path(model.path), read_config(Path(model.path)))
        except ValueError as error:
            found.append(f"model.path: {error}")
    return found


def _domain_problems(name: str, specialist: SpecialistConfig, config: RunConfig) -> list[str]:
    prefix, domain, sampling = f"domains.{name}", specialist.domain, specialist.sampling
    found = []
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        found.append(f"{prefix}: got name {name!r}, expected lower-case letters, digits and _")
    if domain.kind not in DOMAIN_KINDS:
        found.append(choose(f"{prefix}.domain.kind", domain.kind, DOMAIN_KINDS))
    if domain.source.endswith((".jsonl", ".parquet")) and not Path(domain.source).is_file():
        found.append(f"{prefix}.domain.source: got {domain.source!r}, no such file from {Path.cwd()}")
    elif domain.source != "procedural" and not domain.source.endswith((".jsonl", ".parquet")) and domain.source.count("/") != 1:
        found.append(
            f"{prefix}.domain.source: got {domain.source!r}, expected procedural, a .jsonl or .parquet file, or owner/name of a dataset"
        )
    if sampling.max_turns > 1 and domain.kind != "agent":
        found.append(f"{prefix}.sampling.max_turns: got {sampling.max_turns}, expected 1 for kind {domain.kind}")
    if sampling.max_new_tokens > config.engine.row_tokens:
        got = f"{prefix}.sampling.max_new_tokens: got {sampling.max_new_tokens}"
        found.append(f"{got}, expected at most engine.row_tokens = {config.engine.row_tokens}")
    if sampling.temperature == 0:
        found.append(f"{prefix}.sampling.temperature: got 0, expected above 0: greedy samples of one prompt are all alike")
    if specialist.grpo.samples_per_prompt < 2:
        got = f"{prefix}.grpo.samples_per_prompt: got {specialist.grpo.samples_per_prompt}"
        found.append(f"{got}, expected at least 2: the baseline is the group's mean")
    return found


def _mtp_problems(config: RunConfig) -> list[str]:
    """Refuse what needs an MTP block of a model that has none; a checkpoint says itself what it has."""
    if config.model.path or (isinstance(config.model, ModelConfig) and config.model.num_nextn_predict_layers):
        return []
    losses = {"base": config.base, "warmup": config.warmup} | {f"domains.{n}.sft": s.sft for n, s in config.domains.items()}
    found = [
        f"{name}.mtp_loss_weight: got {loss.mtp_loss_weight:g}, expected 0: the model has no MTP block"
        for name, loss in losses.items()
        if loss.mtp_loss_weight
    ]
    return found + [
        f"domains.{name}.sampling.speculative: got true, expected false: the model has no MTP block to draft with"
        for name, specialist in config.domains.items()
        if specialist.sampling.speculative
    ]


def _distill_problems(config: RunConfig) -> list[str]:
    found = []
    if config.distill.init not in ("warmup", "base"):
        found.append(choose("distill.init", config.distill.init, ("warmup", "base")))
    for name, weight in config.distill.weights.items():
        if name not in config.domains:
            found.append(choose("distill.weights", name, tuple(config.domains)))
        if weight <= 0:
            found.append(f"distill.weights.{name}: got {weight}, expected above 0; delete the domain to leave it out")
    if config.distill.prompts_per_step < len(config.domains):
        found.append(
            f"distill.prompts_per_step: got {config.distill.prompts_per_step}, expected at least one a domain = {len(config.domains)}"
        )
    return found


_FROM_ONE = (
    "steps tokens_per_step demonstrations save_every prompts_per_step samples_per_prompt train_prompts prompts max_new_tokens max_turns "
    "row_tokens rows ranks expert_ranks threads_per_rank updates_per_rollout chunk_tokens slots memory_mib difficulty"
)
_FROM_ZERO = (
    "warmup_steps weight_decay final_lr_ratio gpus_per_rank parallel_steps temperature kl_weight off_policy_mask_nats balance_loss_weight "
    "router_bias_speed mtp_loss_weight indexer_loss_weight indexer_dense_steps seed dashboard_port"
)
_AT_LEAST = dict.fromkeys(_FROM_ONE.split(), 1.0) | dict.fromkeys(_FROM_ZERO.split(), 0.0)
_ABOVE_ZERO = {"cpus_per_rank", "lr", "grad_clip", "update_rms", "timeout_s", "clip_low", "clip_high", "mismatch_limit_nats", "eps"}
_SHARES = {"diligence", "base_diligence", "infrastructure_limit", "momentum"}


def _out_of_range(prefix: str, node: Any) -> list[str]:
    """Check every number of a tree of dataclasses against the range its name stands for; the model checks itself."""
    if isinstance(node, dict):
        return [line for name, value in node.items() for line in _out_of_range(f"{prefix}{name}.", value)]
    if not is_dataclass(node) or isinstance(node, ArchitectureConfig):
        return []
    found = []
    for name in (f.name for f in fields(node)):
        value, key = getattr(node, name), prefix + name
        if name in _AT_LEAST and value < _AT_LEAST[name]:
            found.append(f"{key}: got {value}, expected at least {_AT_LEAST[name]:g}")
        elif name in _ABOVE_ZERO and value <= 0:
            found.append(f"{key}: got {value}, expected above 0")
        elif name in _SHARES and not 0 <= value <= 1:
            found.append(f"{key}: got {value}, expected 0 to 1")
        elif name == "betas" and (len(value) != 2 or not all(0 <= beta < 1 for beta in value)):
            found.append(f"{key}: got {value}, expected two numbers from 0 to below 1")
        elif name == "name" and value not in ("muon", "adamw"):
            found.append(choose(key, value, ("muon", "adamw")))
        found += _out_of_range(f"{key}.", value)
    return found


def _strangers(prefix: str, node: DictConfig) -> list[tuple[str, str]]:
    """List the keys that no dataclass has: `+typo=1` puts them past Hydra's own check."""
    schema = OmegaConf.get_type(node)
    known = {f.name for f in fields(schema)} if is_dataclass(schema) else None
    found = []
    for name in map(str, node):
        if known is not None and name not in known:
            found.append((f"{prefix}{name}", str(node._get_node(name))))
        elif isinstance(value := None if OmegaConf.is_missing(node, name) else node[name], DictConfig):
            found += _strangers(f"{prefix}{name}.", value)
    return found


def _missing(key: str) -> str:
    if key == "stage":
        return f"stage: missing, add one of {', '.join(f'+stage={stage}' for stage in STAGES)}"
    return f"{key}: missing, expected a value in the YAML or {key}=... on the command line"
