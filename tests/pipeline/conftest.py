"""A composed configuration for tests that need one."""

import pytest
from hydra import compose, initialize_config_dir

from pipeline.config import CONF, RunConfig, convert, register


@pytest.fixture
def configure(tmp_path):
    """Compose a run as the command line would, with overrides; outputs go to a temporary folder."""

    def composed(*overrides: str) -> RunConfig:
        register()
        with initialize_config_dir(str(CONF), version_base="1.3"):
            stage = [] if any("stage=" in override for override in overrides) else ["+stage=all"]
            return convert(compose("config", [*stage, f"output_dir={tmp_path / 'outputs'}", "tracking=off", *overrides]))

    return composed
