"""Say what a token costs: FLOPs, KV bytes and parameters of any V4 or V3.2 model at any length, against V3.2."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from model.config import AnyConfig, ModelConfig, load_config, parse_config
from model.efficiency import (
    GROUPS,
    PRECISIONS,
    cache,
    flops_by_group,
    flops_per_token,
    kv_bytes,
    parameters,
    state_bytes,
)
from pipeline.config import CONF
from pipeline.efficiency_page import UNITS, show
from pipeline.errors import UsageError, choose

BASELINE = "v32"
DEFAULTS = {
    "models": "v4_pro,v4_flash,v32",
    "lengths": "4K,16K,64K,128K,256K,512K,1M",
    "output": "table",
    "output_dir": "outputs",
}
OUTPUTS = ("table", "json", "plot")


def main(arguments: list[str]) -> int:
    """Run the verb `efficiency`.

    Args:
        arguments: `key=value` words; keys as in `DEFAULTS`. A model is a name in `conf/model`, a `config.json`, or a directory with one;
            a length is a number of tokens, K and M for 1024 and 1048576 of them.

    Returns:
        Exit code: 0 done, 2 wrong command or configuration.
    """
    try:
        options = _options(arguments)
        models = {name: read_model(name) for name in _words("models", options["models"])}
        lengths = [_length(word) for word in _words("lengths", options["lengths"])]
        _print(models, lengths, output=options["output"], output_dir=Path(options["output_dir"]))
    except (UsageError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _print(models: dict[str, AnyConfig], lengths: list[int], *, output: str, output_dir: Path) -> None:
    if output == "json":
        print(json.dumps(measure(models, lengths), indent=2))
    elif output == "table":
        show(models, measure(models, lengths), baseline=read_model(BASELINE))
    else:
        # Imported here: matplotlib is slow to load.
        from pipeline.efficiency_figure import draw

        print(draw(models, baseline=read_model(BASELINE), longest=max(lengths), path=output_dir / "efficiency.png"))


def measure(models: dict[str, AnyConfig], lengths: list[int]) -> dict[str, Any]:
    """Count everything.

    Args:
        models: configurations by name.
        lengths: tokens of context, the decoded one included.

    Returns:
        `lengths`, and `models` by name: `flops_per_token` (FP8-equivalent), `kv_bytes`, `flops_vs_v32` and `kv_vs_v32` (shares of the
        released V3.2's), each a list along the lengths; `params_total`, `params_active`, and in neither of them
        `params_hyper_connections`; `flops_by_group`, `kv_by_kind`, again lists; `state_bytes`. Then `accounting`: what a FLOP of each
        precision counts.
    """
    baseline = read_model(BASELINE)
    found = {}
    for name, config in models.items():
        flops, stored = [flops_per_token(config, n) for n in lengths], [kv_bytes(config, n) for n in lengths]
        groups, kinds = [flops_by_group(config, n) for n in lengths], [cache(config, n) for n in lengths]
        params = parameters(config)
        found[name] = {
            "flops_per_token": flops,
            "kv_bytes": stored,
            "flops_vs_v32": [value / flops_per_token(baseline, n) for value, n in zip(flops, lengths, strict=True)],
            "kv_vs_v32": [value / kv_bytes(baseline, n) for value, n in zip(stored, lengths, strict=True)],
            "params_total": params.total,
            "params_active": params.active,
            "params_hyper_connections": params.hyper_connections,
            "flops_by_group": {group: [by_group[group] for by_group in groups] for group in GROUPS},
            "kv_by_kind": {kind.name: [at[i].vectors * at[i].bytes_each for at in kinds] for i, kind in enumerate(kinds[0])},
            "state_bytes": state_bytes(config),
        }
    return {"lengths": lengths, "models": found, "accounting": PRECISIONS}


def _options(arguments: list[str]) -> dict[str, str]:
    options = dict(DEFAULTS)
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals:
            raise UsageError(f"{argument!r}: expected key=value, with key one of {', '.join(DEFAULTS)}")
        if key not in DEFAULTS:
            raise UsageError(choose("key", key, DEFAULTS))
        options[key] = value
    if options["output"] not in OUTPUTS:
        raise UsageError(choose("output", options["output"], OUTPUTS))
    return options


def _words(key: str, value: str) -> list[str]:
    words = [word.strip() for word in value.strip("[]").split(",")]
    if not all(words):
        raise UsageError(f"{key}: got {value!r}, expected values with commas between them, like {key}={DEFAULTS[key]}")
    return list(dict.fromkeys(words))


def _length(word: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KM]?)", word, re.ASCII | re.IGNORECASE)
    tokens = float(match[1]) * UNITS.get(match[2].upper(), 1) if match else 0.0
    if tokens < 1 or not tokens.is_integer():
        raise UsageError(f"lengths: got {word!r}, expected whole numbers of tokens from 1 up, like 4096, 128K or 1M")
    return int(tokens)


def read_model(name: str) -> AnyConfig:
    """Read a model's configuration.

    Args:
        name: of a file in `conf/model`, or path of a `config.json` or of a directory with one.

    Raises:
        UsageError: there is none, it is damaged, or it contradicts itself; names the file, the field, its value and what was expected.
    """
    known = {path.stem: path for path in (CONF / "model").glob("*.yaml")}
    path = known.get(name, Path(name))
    if path.is_dir():
        path = path / "config.json"
        if not path.is_file():
            raise UsageError(f"models: {name}: no config.json in this directory")
    if not path.is_file():
        if "/" in name or path.suffix:
            raise UsageError(
                f"models: {name}: no such file, expected a config.json, a directory with one, or one of {', '.join(sorted(known))}"
            )
        raise UsageError(choose("models", name, known))
    try:
        if name not in known:
            return _from_file(path)
        values = OmegaConf.to_container(OmegaConf.load(path))
        assert isinstance(values, dict)
        return parse_config({"model_type": ModelConfig.model_type} | {str(key): value for key, value in values.items()})
    except ValueError as error:
        raise UsageError(str(error)) from error


def _from_file(path: Path) -> AnyConfig:
    if path.name != "config.json":
        return load_config(path)
    # Imported here: reads transformers' keys as well, and takes a second to load torch.
    from model.checkpoints.settings import read_config

    return read_config(path.parent)
