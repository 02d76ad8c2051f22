"""Report of a run."""

from pathlib import Path

from pipeline.config import RunConfig
from runtime.config import TrackingConfig


def write_report(run_dir: Path, *, tracking: TrackingConfig) -> str:
    return "report"


def show(config: RunConfig) -> int:
    return 0
