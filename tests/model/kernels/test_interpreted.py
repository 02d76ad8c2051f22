"""The Triton kernels equal their references: under Triton's interpreter on a CPU, which needs a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "interpreted"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_kernels_under_the_interpreter(path):
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(path)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, cwd=FOLDER.parents[3])
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
