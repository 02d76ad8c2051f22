"""Training with the Triton kernels follows the loss curve of plain torch: 50 supervised steps on the math domain, in fp32 and bf16.

How far two right curves may part is measured, not chosen: plain torch runs three times, as it is, with the samples of a row in another
order, and on the CPU. These differ by rounding alone, which training amplifies, in leaps where an expert or an entry is chosen otherwise.
"""

import json
import os
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest
import torch
import yaml

from domains.catalog import make_domain
from domains.config import DomainConfig, SandboxConfig
from experts.fresh import write_fresh_model
from experts.pretrain import conversation_texts
from model.config import ModelConfig
from model.tokenizer import Tokenizer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
PROGRAM, ROOT = Path(__file__).with_name("curve_program.py"), Path(__file__).parents[2]
STEPS = 50
RUNS = {
    "triton": ("triton", "packed"),
    "plain": ("reference", "packed"),
    "other order": ("reference", "reordered"),
    "cpu": ("reference", "packed"),
}
"""Kernels, and the order of a row's samples."""
ROUNDING = {"fp32": 5e-5, "bf16": 1.4e-3}
"""Distance of two runs of plain torch on a CPU, rows as they are and reordered: mean relative difference over 50 steps."""
SPREAD = 3
"""Times the largest distance between two runs of plain torch, here or on that CPU."""
FIRST = {"fp32": 1e-5, "bf16": 2**-9}
"""Relative difference of the first loss: some tens of roundings in fp32, one in bf16; a mean over a thousand targets keeps less."""
END = 0.01
"""Relative difference of the mean of the last ten losses, four times that of two runs of plain torch in bf16 on a CPU."""


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """A fresh model of conf/model/tiny.yaml with a tokenizer of the math domain."""
    domain = make_domain("math", DomainConfig(kind="math"), SandboxConfig())
    values = yaml.safe_load((ROOT / "conf/model/tiny.yaml").read_text())
    del values["defaults"]
    texts = domain.documents(500, seed=0) + conversation_texts(domain, seed=0)
    tokenizer = Tokenizer.train(texts, values["vocab_size"], boilerplate=domain.boilerplate())
    domain.close()
    directory = tmp_path_factory.mktemp("curves") / "fresh"
    write_fresh_model(directory, ModelConfig(**values), tokenizer, seed=0)
    return directory


@pytest.fixture(scope="module")
def curves(model_dir):
    """All runs at once, each a process: (precision, run) to losses."""
    keys = [(precision, name) for precision in FIRST for name in RUNS]
    processes = [start(model_dir, *key) for key in keys]
    outputs = [process.communicate(timeout=400)[0] for process in processes]
    for key, process, output in zip(keys, processes, outputs, strict=True):
        assert process.returncode == 0, f"{key}: {output[-3000:]}"
    return {key: json.loads(output.split("LOSSES ")[1].splitlines()[0]) for key, output in zip(keys, outputs, strict=True)}


def start(model_dir, precision, name):
    device = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""} if name == "cpu" else {"DS_ACCELERATOR": "cuda"}
    environment = os.environ | device | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    rendezvous = f"file://{model_dir}/{precision}-{name.replace(' ', '-')}"
    command = [sys.executable, str(PROGRAM), str(model_dir), rendezvous, RUNS[name][0], precision, RUNS[name][1], str(STEPS)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def distance(a, b):
    """Return the mean relative difference of two curves."""
    return sum(abs(x - y) / y for x, y in zip(a, b, strict=True)) / len(a)


@pytest.mark.parametrize("precision", FIRST)
def test_the_kernels_follow_the_curve_of_plain_torch(curves, precision):
    runs = {name: curves[precision, name] for name in RUNS}
    apart = {pair: distance(runs[pair[0]], runs[pair[1]]) for pair in combinations(["plain", "other order", "cpu"], 2)}
    ours, plain = runs["triton"], runs["plain"]
    for name, losses in runs.items():
        print(f"{precision} {name:12}", *(f"{loss:.4f}" for loss in losses[:3]), "...", *(f"{loss:.4f}" for loss in losses[-3:]))
    print(f"{precision} triton from plain {distance(ours, plain):.2e}, plain torch's runs:", *(f"{d:.2e}" for d in apart.values()))
    assert sum(plain[-10:]) / 10 < plain[0] / 2
    assert abs(ours[0] - plain[0]) <= FIRST[precision] * plain[0]
    assert distance(ours, plain) <= SPREAD * max(ROUNDING[precision], *apart.values())
    assert abs(sum(ours[-10:]) / sum(plain[-10:]) - 1) <= END
