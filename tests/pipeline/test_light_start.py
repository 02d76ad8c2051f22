"""Plans and refusals load nothing heavy: what is not imported cannot make a user wait."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
HEAVY = ("torch", "ray", "deepspeed", "wandb", "datasets", "transformers", "matplotlib")
ASK = f"""
import sys
from pipeline.__main__ import main
code = main(sys.argv[1:])
loaded = [name for name in {HEAVY} if name in sys.modules]
print("loaded", loaded, "code", code)
"""


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(["plan", "+stage=all"], 0), (["run", "+stage=all", "sed=1"], 2), (["run", "+stage=all", "base.steps=0"], 2)],
    ids=["plan", "unknown key", "contradiction"],
)
def test_nothing_heavy_is_imported(tmp_path, arguments, code):
    done = subprocess.run(
        [sys.executable, "-c", ASK, *arguments, f"output_dir={tmp_path}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines()[-1] == f"loaded [] code {code}", done.stderr
    assert not list(tmp_path.iterdir())


def test_the_composed_configuration_is_shown(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", "run", "+stage=all", "seed=7", "--cfg", "job"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0
    assert "seed: 7" in done.stdout and "stage: all" in done.stdout
