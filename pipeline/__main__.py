"""The command line: `python -m pipeline VERB`; what follows `run`, `plan`, `report` and `doctor` is Hydra's."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from pipeline.config import CONF, RunConfig, convert, example, register, run_name
from pipeline.errors import UsageError, choose, explain

USAGE = """usage: python -m pipeline VERB [OVERRIDE ...]

  run     make what a stage needs, or go on where it stopped: python -m pipeline run +stage=all
  plan    say what would run, what is reused, and why:        python -m pipeline plan +stage=all
  report  write the report of a run again and show it:        python -m pipeline report run=all
  doctor  say what this machine has
  export  write a model for others to load:                   python -m pipeline export FROM TO layout=official
  efficiency  what a token costs in V4 and V3.2:              python -m pipeline efficiency lengths=128K,1M

stages: base, experts, distill, all. Every key: python -m pipeline run +stage=all --cfg job"""

INTERRUPTED = 130


def _run(config: RunConfig) -> int:
    # Imported here: Ray takes half a second, and `plan` and wrong keys must answer at once.
    from pipeline.workflow import run

    return run(config)


def _plan(config: RunConfig) -> int:
    # Imported here: the other verbs do not need it.
    from pipeline.plan import show

    return show(config)


def _report(config: RunConfig) -> int:
    # Imported here: matplotlib is slow to load.
    from pipeline.report import show

    return show(config)


def _doctor(config: RunConfig) -> int:
    # Imported here: looks at torch and Ray, seconds of loading.
    from pipeline.doctor import show

    return show(config)


def _export(arguments: list[str]) -> int:
    # Imported here: loads torch.
    from pipeline.export import main

    return main(arguments)


def _efficiency(arguments: list[str]) -> int:
    # Imported here: the other verbs do not need it.
    from pipeline.efficiency import main

    return main(arguments)


PLAIN: dict[str, Callable[[list[str]], int]] = {"export": _export, "efficiency": _efficiency}
"""Verbs that take arguments of their own instead of a run's configuration."""

VERBS: dict[str, Callable[[RunConfig], int]] = {"run": _run, "plan": _plan, "report": _report, "doctor": _doctor}


def main(arguments: list[str]) -> int:
    """Run one verb.

    Args:
        arguments: the command line after `python -m pipeline`.

    Returns:
        Exit code: 0 done, 1 a step failed, 2 wrong command or configuration, 130 interrupted (the same command resumes).
    """
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0 if arguments else 2
    verb, overrides = arguments[0], [re.sub(r"^stage=", "+stage=", argument) for argument in arguments[1:]]
    if verb in PLAIN:
        return PLAIN[verb](arguments[1:])
    if verb not in VERBS:
        return _refuse(choose("verb", verb, (*VERBS, *PLAIN)))
    if verb in ("doctor", "report") and not any("stage=" in override for override in overrides):
        overrides.append("+stage=all")
    overrides.sort(key=lambda override: override not in ("-m", "--multirun"))  # Hydra takes flags only before the overrides.
    try:
        return _hydra(verb, overrides)
    except (HydraException, OmegaConfBaseException) as error:
        return _refuse(explain(error, overrides, conf=CONF, schema=example()))
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it stopped", file=sys.stderr)
        return INTERRUPTED


def _hydra(verb: str, overrides: list[str]) -> int:
    codes: list[int] = []

    def job(composed: DictConfig) -> None:
        try:
            config = convert(composed)
            if HydraConfig.get().mode == RunMode.MULTIRUN and config.run is None:
                config.run = _sweep_name(config)
            codes.append(VERBS[verb](config))
        except UsageError as error:  # Here and not in `main`: past this function Hydra prints words of its own.
            codes.append(_refuse(str(error)))

    register()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises to us instead of printing and leaving with 1.
    sys.argv = ["python -m pipeline", *overrides]
    hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(job)()
    return max(codes, default=0)


def _sweep_name(config: RunConfig) -> str:
    """Name one run of a sweep by its stage and by what sets it apart."""
    apart = HydraConfig.get().job.override_dirname
    return f"{run_name(config)}-{re.sub(r'[^A-Za-z0-9_.,=+-]', '_', apart)}" if apart else run_name(config)


def _refuse(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
