"""Take a model out: from a run's artifact or any checkpoint to a directory, in the layout that whoever reads it next expects."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from model import weights
from model.checkpoints.layouts import WRITTEN
from model.checkpoints.writing import PRECISIONS
from pipeline.artifacts import Journal
from pipeline.errors import UsageError, choose

USAGE = """usage: python -m pipeline export run=NAME [step=STEP] to=DIR [layout=...] [precision=...]
       python -m pipeline export from=DIR to=DIR [layout=...] [precision=...]

  run        a run under output_dir (outputs), whose last step is taken unless there are several of its kind
  step       base, sft-math, grpo-math, distill, ...
  from       a checkpoint in any layout, instead of a run
  to         a new or empty directory
  layout     official (default) as the release, transformers as that library saves it, native as steps hand it on
  precision  fp4, fp8 (matrices FP8 too), bf16, fp32; what the release keeps above stays above
             left out: the official layout as it was loaded, or fp4 experts and fp8 matrices; the others as the source"""

KEYS = ("run", "step", "from", "to", "layout", "precision", "output_dir")


def main(arguments: list[str]) -> int:
    """Export one model.

    Args:
        arguments: the command line after `python -m pipeline export`, as key=value; two bare paths are `from` and `to`.

    Returns:
        Exit code: 0 done, 1 the disk is full or broken, 2 wrong command or checkpoint; nothing is written then.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if arguments else 2
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        options = _options(arguments)
        source, target = _source(options), Path(options["to"])
        model = weights.load(source, dtype=None)
        layout = options.get("layout", "official")
        weights.save(model, target, layout=layout, precision=options.get("precision"), companions=source)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}; nothing was written", file=sys.stderr)
        return 1
    size = sum(file.stat().st_size for file in target.iterdir())
    print(f"{source} -> {target} ({layout} layout, {size / 1e9:.3g} GB)")
    return 0


def _options(arguments: list[str]) -> dict[str, str]:
    """Read the command line and refuse what no checkpoint is needed to refuse."""
    options: dict[str, str] = {}
    bare = iter(("from", "to"))
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals:
            key, value = next(bare, ""), argument
            if not key:
                raise UsageError(f"{argument!r}: expected key=value; python -m pipeline export --help")
        if key not in KEYS:
            raise UsageError(choose("export", key, KEYS))
        if not value:
            raise UsageError(f"{key}: got nothing, expected a value")
        options[key] = value
    for key, valid in (("layout", WRITTEN), ("precision", PRECISIONS)):
        if key in options and options[key] not in valid:
            raise UsageError(choose(key, options[key], valid))
    if "to" not in options:
        raise UsageError("to: missing, expected the directory to write, to=DIR")
    if ("run" in options) == ("from" in options):
        raise UsageError("expected either run=NAME or from=DIR")
    target = Path(options["to"])
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError(f"to: {target} is there already, expected a new or empty directory")
    return options


def _source(options: dict[str, str]) -> Path:
    """Find the checkpoint: the directory given, or the artifact of a step of a run."""
    if "from" in options:
        return Path(options["from"])
    runs = Path(options.get("output_dir", "outputs")) / "runs"
    folder = runs / options["run"] / "artifacts"
    if not folder.is_dir():
        names = sorted(path.parent.name for path in runs.glob("*/artifacts"))
        raise UsageError(choose("run", options["run"], names) if names else f"run: {folder} does not exist, and there is no run beside it")
    steps = [name for name in _order(runs / options["run"]) if (folder / name / weights.CONFIG).is_file()]
    if not steps:
        raise UsageError(f"run: {folder} holds no model yet")
    step = options.get("step", steps[-1])
    if step not in steps:
        raise UsageError(choose("step", step, steps))
    alike = [name for name in steps if "-" in step and name.split("-")[0] == step.split("-")[0]]
    if "step" not in options and len(alike) > 1:
        raise UsageError(f"step: missing, expected one of {', '.join(steps)}")
    return folder / step


def _order(run: Path) -> list[str]:
    """List the steps of a run's newest attempt, each after its needs."""
    started = [event for event in Journal(run / "journal.jsonl").read() if event["event"] == "run_started"]
    return [entry["step"] for entry in started[-1]["steps"]] if started else []
