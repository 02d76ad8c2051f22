"""Kernels read whole parameters where ZeRO 3 cuts them up outside the forward and backward of the modules that read them.

Plain torch refuses an empty matrix; a kernel would read what lies at its address. Under Triton's interpreter that ends the process.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from experts.fresh import write_fresh_model
from model.config import ModelConfig, V32Config
from model.tokenizer import Tokenizer

PROGRAM = Path(__file__).with_name("cut_up_program.py")
SIZES = {
    "vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "qk_rope_head_dim": 8, "q_lora_rank": 16,
    "index_n_heads": 4, "index_head_dim": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "initializer_range": 0.1,
}  # fmt: skip
CONFIGS = {
    "v4": ModelConfig(
        **SIZES, head_dim=16, o_groups=2, o_lora_rank=16, sliding_window=16, compress_ratios=[4, 128, 0], index_topk=2, num_hash_layers=1,
        hc_sinkhorn_iters=2,
    ),
    "v32": V32Config(
        **SIZES, kv_lora_rank=16, qk_nope_head_dim=8, v_head_dim=16, index_topk=5, intermediate_size=64, first_k_dense_replace=1, n_group=2,
        topk_group=1, num_nextn_predict_layers=0,
    ),
}  # fmt: skip


def measured(directory: Path, *, ranks: int, kernels: str) -> list[dict[str, float]]:
    """Run all ranks under the interpreter and add up what each measured."""
    rendezvous = f"file://{directory}/rendezvous-{ranks}"
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    processes = [
        subprocess.Popen(
            [sys.executable, str(PROGRAM), str(directory), str(rank), str(ranks), kernels, rendezvous],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )
        for rank in range(ranks)
    ]  # fmt: skip
    printed = [process.communicate(timeout=400) for process in processes]
    for rank, (process, (_, errors)) in enumerate(zip(processes, printed, strict=True)):
        assert process.returncode == 0, f"rank {rank} ended with {process.returncode}: {errors[-3000:]}"
    parts = [json.loads(out.split("MEASURED ")[1]) for out, _ in printed]
    return [{name: sum(part[name] for part in step) for name in step[0]} for step in zip(*parts, strict=True)]


@pytest.mark.parametrize("name", CONFIGS)
def test_two_ranks_with_triton_follow_one_with_plain_torch(name, tmp_path):
    pytest.importorskip("triton")
    tokenizer = Tokenizer.train(["Ada has 3 coins, finds 4. 3+4=7."] * 5, 300, boilerplate=[])
    write_fresh_model(tmp_path, CONFIGS[name], tokenizer, seed=0)
    whole = measured(tmp_path, ranks=1, kernels="reference")
    cut_up = measured(tmp_path, ranks=2, kernels="triton")
    assert len(whole[0]) == (5 if name == "v4" else 4)
    for got, want in zip(cut_up, whole, strict=True):
        assert got == pytest.approx(want, abs=2e-5)
