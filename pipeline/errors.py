"""Say what a user got wrong in one message, with the nearest name that would have been right."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from pathlib import Path

from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException


class UsageError(ValueError):
    """A wrong command or configuration; the message is complete, the exit code 2."""


def choose(key: str, got: str, valid: Iterable[str]) -> str:
    """Say that a name is unknown, which one it may have meant, and which ones there are."""
    names = sorted(valid)
    near = difflib.get_close_matches(got, names, n=1, cutoff=0.5)
    hint = f", did you mean {near[0]!r}?" if near else "."
    return f"{key}: unknown {got!r}{hint} Valid: {', '.join(names)}"


def explain(error: HydraException | OmegaConfBaseException, overrides: list[str], *, conf: Path, schema: DictConfig) -> str:
    """Turn what Hydra raised into one message of ours.

    Args:
        error: what composition raised.
        overrides: the command line after the verb.
        conf: folder of the YAML groups.
        schema: every key that exists, to find the nearest.
    """
    for override in overrides:
        name, _, value = override.lstrip("+~").partition("=")
        group = name.split("@")[0].lstrip("/")
        options = sorted(path.stem for path in (conf / group).glob("*.yaml")) if group else []
        if isinstance(error, MissingConfigException) and options and any(part not in options for part in value.split(",")):
            return choose(group, next(part for part in value.split(",") if part not in options), options)
    unknown = [override for override in overrides if ("=" in override or override[0] == "~") and not _exists(schema, override, conf)]
    if unknown and _is_about_a_key(str(error)):
        name, _, value = unknown[0].lstrip("+~").partition("=")
        return unknown_key(name, None if unknown[0][0] == "~" else value, conf=conf, schema=schema)
    if broken := [override for override in overrides if "=" not in override and not override.startswith(("-", "~"))]:
        return f"{broken[0]!r}: expected key=value"
    return _first_sentence(_root(error))


def _exists(schema: DictConfig, override: str, conf: Path) -> bool:
    name = override.lstrip("+~").partition("=")[0].split("@")[0].lstrip("/")
    return name.startswith("hydra") or (conf / name).is_dir() or name in keys(schema)


def keys(schema: DictConfig) -> list[str]:
    """List every key of a configuration, inner nodes too, dotted."""
    found = []
    plain = OmegaConf.to_container(schema, resolve=False)
    stack: list[tuple[str, object]] = [("", plain)]
    while stack:
        prefix, node = stack.pop()
        if isinstance(node, dict):
            for name, value in node.items():
                found.append(f"{prefix}{name}")
                stack.append((f"{prefix}{name}.", value))
    return found


def unknown_key(name: str, value: str | None, *, conf: Path, schema: DictConfig) -> str:
    """Say that no such key exists and which one it may have meant; `value` is what it was to be, None when it was to be deleted."""
    known = keys(schema)
    groups = sorted(path.name for path in conf.iterdir() if path.is_dir())
    parent, _, last = name.rpartition(".")
    siblings = {key.rpartition(".")[2]: key for key in known if key.rpartition(".")[0] == parent}
    tails = {key.rpartition(".")[2]: key for key in reversed(known)}
    near = [siblings[tail] for tail in difflib.get_close_matches(last, list(siblings), n=1, cutoff=0.5)]
    near = near or ([] if parent in known else difflib.get_close_matches(name, known + groups, n=1, cutoff=0.6))
    near = near or ([] if parent in known else [tails[tail] for tail in difflib.get_close_matches(last, list(tails), n=1, cutoff=0.6)])
    if near:
        meant = f"~{near[0]}" if value is None else f"{'+' if near[0] == 'stage' else ''}{near[0]}={value}"
        return f"unknown key {name!r}, did you mean {meant}?"
    listed = sorted(siblings) or sorted({key.split(".")[0] for key in known})
    where = f" under {parent}" if siblings and parent else ""
    return f"unknown key {name!r}. Valid{where}: {', '.join(listed)}. All keys: python -m pipeline run +stage=all --cfg job"


def _is_about_a_key(text: str) -> bool:
    return bool(
        re.search(r"not in struct|not in '|Could not override|Could not append|Could not delete|No match in the defaults list|Key '", text)
    )


def _root(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _first_sentence(error: BaseException) -> str:
    """Keep Hydra's own words about the value, and the key it is about, without its object paths."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    key = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("full_key:")), "")
    return f"{key}: {lines[0]}" if key else lines[0] if lines else type(error).__name__
