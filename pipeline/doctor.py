"""Say what this machine has: versions, processors, memory, disk, and which sandbox works."""

from __future__ import annotations

import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table
from rich.text import Text

from domains.sandbox import probe
from pipeline.config import RunConfig

PACKAGES = ("torch", "deepspeed", "ray", "triton", "hydra-core", "math-verify", "wandb", "datasets", "tokenizers")


def show(config: RunConfig) -> int:
    """Print the findings.

    Returns:
        Exit code: 0 when everything that the configured domains need is there, 1 when something is missing.
    """
    rows, missing = findings(config)
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), show_header=False)
    for name, value, good in rows:
        table.add_row(Text("ok" if good else "missing", style="green" if good else "bold red"), name, Text(value))
    console = Console()
    console.print(table)
    for line in missing:
        console.print(Text(line, style="bold red"))
    return 1 if missing else 0


def findings(config: RunConfig) -> tuple[list[tuple[str, str, bool]], list[str]]:
    """Look at the machine.

    Returns:
        Rows of name, value, and whether it is good; and one line on everything that keeps the configured run from starting.
    """
    memory, disk = psutil.virtual_memory(), shutil.disk_usage(_existing(Path(config.output_dir).resolve()))
    rows = [
        ("Python", platform.python_version(), True),
        *((package, found, found != "not installed" or package == "triton") for package, found in ((p, _version(p)) for p in PACKAGES)),
        ("processors", f"{len(os.sched_getaffinity(0))} of {os.cpu_count()}", True),
        ("GPUs", _gpus(), True),
        ("memory", f"{memory.available / 2**30:.1f} GiB free of {memory.total / 2**30:.1f}", True),
        ("disk", f"{disk.free / 2**30:.1f} GiB free for {config.output_dir}", disk.free > 2**30),
        (
            "C++ compiler",
            shutil.which("g++") or "none: DeepSpeed builds a small op with it; sudo apt-get install g++",
            shutil.which("g++") is not None,
        ),
    ]
    probed = probe.doctor()
    rows.append(("sandbox", probed["backend"] or "none", bool(probed["backend"])))
    rows += [(f"sandbox {name}", str(probed[name]), True) for name in ("bwrap", "bwrap_version", "user_namespaces", "kernel")]
    rows += [
        (f"sandbox {name}", f"not taken: {why}", name != "bwrap" or bool(probed["backend"])) for name, why in probed["failures"].items()
    ]
    missing = [f"{name}: {value}" for name, value, good in rows if not good and name in (*PACKAGES, "C++ compiler", "disk")]
    if not probed["backend"] and not config.sandbox.allow_unsafe:
        missing.append("sandbox: no safe backend, so the code and agent domains refuse to start; sudo apt-get install bubblewrap")
    return rows, missing


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _gpus() -> str:
    # Imported here: torch takes a second, and no other verb's start may wait for this module's packages.
    import torch

    return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())) or "none: everything runs on the CPU"


def _existing(path: Path) -> Path:
    return path if path.exists() else _existing(path.parent)
