"""The kernels compile for Hopper and fit its shared memory, which the interpreter says nothing about and CI has no GPU to show."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("compile_program.py")
SHARED_BYTES = 227 * 1024
"""Of one program on Hopper."""
FOLDERS = {
    "experts", "hyper_connections", "indexer", "logprob", "newton_schulz", "pooling", "quant", "reverse_kl", "rotary_norm", "router",
    "sparse_attention", "static_decode", "updates",
}  # fmt: skip


def test_every_kernel_compiles_for_hopper(tmp_path):
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    root = str(PROGRAM.parents[3])
    done = subprocess.run(
        [sys.executable, str(PROGRAM)], check=False, capture_output=True, text=True, cwd=root, env=environment | {"PYTHONPATH": root}
    )
    assert done.returncode == 0, done.stderr[-4000:]
    compiled = json.loads(done.stdout.split("COMPILED ")[1])
    assert not compiled["failed"], compiled["failed"]
    assert {name.split(".")[0] for name in compiled["variants"]} == FOLDERS
    too_large = {name: size for name, size in compiled["shared"].items() if size > SHARED_BYTES}
    assert not too_large, too_large
