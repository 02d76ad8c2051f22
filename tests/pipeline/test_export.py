"""The verb `export`: from a run's artifact or a directory to any layout, or one message and nothing written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import DeepseekV4ForCausalLM

from model import weights
from model.config import ModelConfig
from model.tokenizer import Tokenizer
from model.transformer import Transformer
from pipeline.export import main

CONFIG = ModelConfig(
    vocab_size=400,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    head_dim=16,
    qk_rope_head_dim=8,
    q_lora_rank=16,
    o_groups=1,
    o_lora_rank=16,
    sliding_window=8,
    compress_ratios=[4, 128, 0],
    index_n_heads=2,
    index_head_dim=8,
    index_topk=4,
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    num_hash_layers=1,
)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs as the workflow leaves them: a journal, and links to artifacts."""
    root = tmp_path_factory.mktemp("outputs")
    tokenizer = Tokenizer.train(["a text"], 400)
    for seed, step in enumerate(("base", "grpo-math", "grpo-code", "distill")):
        torch.manual_seed(seed)
        weights.save(Transformer(CONFIG), root / "artifacts" / f"{step}-key")
        tokenizer.save(root / "artifacts" / f"{step}-key")
    for run, steps in {"all": ["base", "grpo-math", "grpo-code", "distill"], "experts": ["base", "grpo-math", "grpo-code"]}.items():
        folder = root / "runs" / run / "artifacts"
        folder.mkdir(parents=True)
        for step in steps:
            (folder / step).symlink_to(Path("../../../artifacts") / f"{step}-key")
        event = {"event": "run_started", "steps": [{"step": step, "key": "key"} for step in steps]}
        (folder.parent / "journal.jsonl").write_text(json.dumps(event) + "\n")
    return root


def same(a: Path, b: Path) -> bool:
    ours, theirs = weights.load(a).state_dict(), weights.load(b).state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_runs_student_comes_out_as_the_release_is(outputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"output_dir={outputs}", "run=all", f"to={tmp_path / 'a'}"]) == 0
    tensors = load_file(tmp_path / "a" / weights.TENSORS)
    assert (
        tensors["layers.1.ffn.experts.3.w2.weight"].dtype == torch.int8
        and tensors["layers.1.attn.wq_a.weight"].dtype == torch.float8_e4m3fn
    )
    assert Tokenizer.load(tmp_path / "a").digest() == Tokenizer.load(outputs / "artifacts" / "distill-key").digest()
    assert "official layout" in capsys.readouterr().out
    assert {file.stat().st_mode for file in (tmp_path / "a").iterdir()} == {(tmp_path / "a" / weights.CONFIG).stat().st_mode}


def test_a_step_comes_out_for_transformers(outputs: Path, tmp_path: Path) -> None:
    assert main([f"output_dir={outputs}", "run=experts", "step=grpo-math", f"to={tmp_path / 'a'}", "layout=transformers"]) == 0
    assert same(tmp_path / "a", outputs / "artifacts" / "grpo-math-key")
    _, report = DeepseekV4ForCausalLM.from_pretrained(tmp_path / "a", output_loading_info=True)
    assert not any(report.values())


def test_checkpoints_go_from_layout_to_layout_without_loss(outputs: Path, tmp_path: Path) -> None:
    source = outputs / "artifacts" / "base-key"
    assert main([str(source), str(tmp_path / "a"), "layout=official", "precision=fp32"]) == 0
    assert main([f"from={tmp_path / 'a'}", f"to={tmp_path / 'b'}", "layout=transformers"]) == 0
    assert main([f"from={tmp_path / 'b'}", f"to={tmp_path / 'c'}", "layout=native"]) == 0
    assert same(tmp_path / "c", source) and Tokenizer.load(tmp_path / "c").digest() == Tokenizer.load(source).digest()


def test_the_releases_files_come_out_byte_for_byte(outputs: Path, tmp_path: Path) -> None:
    assert main([f"output_dir={outputs}", "run=all", f"to={tmp_path / 'a'}"]) == 0
    assert main([f"from={tmp_path / 'a'}", f"to={tmp_path / 'b'}"]) == 0
    assert {f.name: f.read_bytes() for f in (tmp_path / "a").iterdir()} == {f.name: f.read_bytes() for f in (tmp_path / "b").iterdir()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run=all"], "to: missing"),
        (["to=x"], "either run=NAME or from=DIR"),
        (["run=all", "from=x", "to=x"], "either run=NAME or from=DIR"),
        (["run=al", "to=x"], "did you mean 'all'"),
        (["run=all", "step=distil", "to=x"], "did you mean 'distill'"),
        (["run=experts", "to=x"], "step: missing, expected one of base, grpo-math, grpo-code"),
        (["run=all", "to=x", "layout=oficial"], "did you mean 'official'"),
        (["run=all", "to=x", "precision=fp16"], "precision: unknown 'fp16'"),
        (["run=all", "to=x", "precison=fp8"], "did you mean 'precision'"),
        (["run=all", "to=x", "layout=transformers", "precision=fp4"], "expected one of bf16, fp32 for the transformers layout"),
        (["from=nowhere", "to=x"], "config.json"),
        (["run=all", "to=."], "expected a new or empty directory"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_command_gets_one_message(
    outputs: Path, tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "kept.txt").write_text("mine")
    assert main([f"output_dir={outputs}", *arguments]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_without_arguments_it_says_how(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0 and main([]) == 2
    assert "layout" in capsys.readouterr().out
