"""The command line refuses what is wrong in one message, and answers plans at once."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.__main__ import main

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """Run the command line in this process; returns exit code, standard output and standard error."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["pipeline"])
        monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
        code = main([*arguments, *([f"output_dir={tmp_path}"] if len(arguments) > 1 else [])])
        return code, *capsys.readouterr()

    return run


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["plann"], "verb: unknown 'plann', did you mean 'plan'? Valid: doctor, efficiency, export, plan, report, run"),
        (["plan", "+stage=expets"], "stage: unknown 'expets', did you mean 'experts'? Valid: all, base, distill, experts"),
        (["plan", "+stage=all", "model=tny"], "model: unknown 'tny', did you mean 'tiny'?"),
        (["plan", "+stage=all", "sed=3"], "unknown key 'sed', did you mean seed=3?"),
        (["plan", "+stage=all", "+sed=3"], "unknown key 'sed', did you mean seed=3?"),
        (["plan", "+stge=all"], "unknown key 'stge', did you mean +stage=all?"),
        (["plan", "+stage=all", "domains.math.gpo.steps=3"], "did you mean domains.math.grpo.steps=3?"),
        (["plan", "+stage=all", "domains.mth.grpo.steps=3"], "did you mean domains.math.grpo.steps=3?"),
        (["plan", "+stage=all", "+domains.math.domain.foo=3"], "Valid under domains.math.domain: "),
        (["plan", "+stage=all", "domains.math.grpo.steps=abc"], "domains.math.grpo.steps: Value 'abc'"),
        (["plan", "+stage=all", "~domains.cod"], "unknown key 'domains.cod', did you mean ~domains.code?"),
        (["plan", "+stage=all", "seed"], "'seed': expected key=value"),
        (["plan", "seed=1"], "stage: missing, add one of +stage=base"),
        (["plan", "+stage=all", "tracking.wandb=offlin"], "tracking.wandb: unknown 'offlin', did you mean 'offline'?"),
        (["report", "run=nothing"], "is no run"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_command_is_refused_with_the_nearest_right_one(call, arguments, said):
    code, _, error = call(*arguments)
    assert code == 2
    assert said in error
    assert error.startswith("error: ")
    assert "Traceback" not in error and "Error executing job" not in error


def test_all_contradictions_are_said_at_once(call):
    changes = ["seed=-1", "domains.math.grpo.steps=0", "model.o_groups=3", "+distill.weights.mth=1", "domains.code.sampling.max_turns=3"]
    code, _, error = call("plan", "+stage=all", *changes)
    assert code == 2
    for said in (
        "seed: got -1",
        "domains.math.grpo.steps: got 0",
        "model.o_groups: got 3",
        "did you mean 'math'",
        "domains.code.sampling.max_turns: got 3",
    ):
        assert said in error


def test_a_missing_source_file_is_named(call):
    code, _, error = call("plan", "+stage=all", "domains.math.domain.source=absent.jsonl")
    assert code == 2
    assert "domains.math.domain.source: got 'absent.jsonl', no such file" in error


def test_no_verb_shows_the_usage(call):
    code, out, _ = call()
    assert code == 2
    assert "python -m pipeline run +stage=all" in out
    assert call("--help")[0] == 0


@pytest.mark.parametrize("argument", ["stage=all", "+stage=all"])
def test_a_plan_lists_every_step_in_order(call, argument):
    code, out, _ = call("plan", argument)
    assert code == 0
    steps = [line.split()[0] for line in out.splitlines()[1:10]]
    assert steps == ["base", *(f"{kind}-{name}" for kind in ("sft", "grpo") for name in ("math", "code", "agent")), "warmup", "distill"]
    assert "0 of 9 steps are done" in out


def test_a_domain_can_be_left_out(call):
    _, out, _ = call("plan", "+stage=all", "~domains.code")
    assert "grpo-math" in out and "code" not in out


def test_a_sweep_names_its_runs_apart(call, monkeypatch):
    names = []
    monkeypatch.setitem(sys.modules["pipeline.__main__"].VERBS, "plan", lambda config: names.append(config.run) or 0)
    assert call("plan", "+stage=distill", "-m", "distill.steps=20,40")[0] == 0
    assert names[0] != names[1]
    assert all("distill" in name and f"distill.steps={steps}" in name for name, steps in zip(names, (20, 40), strict=True))


def test_a_plan_and_a_wrong_key_are_answered_fast(tmp_path):
    for arguments, code in ((["+stage=all"], 0), (["+stage=all", "sed=1"], 2)):
        started = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "pipeline", "plan", *arguments, f"output_dir={tmp_path}"], cwd=ROOT, capture_output=True, check=False
        )
        assert done.returncode == code
        assert time.monotonic() - started < 3.0
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_that_is_none_is_refused_by_file_and_reason(call, tmp_path):
    code, _, error = call("plan", "+stage=base", f"model.path={tmp_path}")
    assert code == 2 and "holds no config.json" in error and "holds no tokenizer.json" in error
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "config.json").write_text('{"model_type": "deepseek_v4", "compress_ratios": [0]}')
    code, _, error = call("plan", "+stage=base", f"model.path={tmp_path}")
    assert code == 2 and f"{tmp_path}/config.json" in error and "compress_ratios: got 1 entries, expected 44" in error


def test_what_needs_an_mtp_block_is_refused_of_a_model_without(call):
    code, _, error = call("plan", "+stage=all", "model=v32_tiny", "base.mtp_loss_weight=0.3", "domains.math.sampling.speculative=true")
    assert code == 2 and "base.mtp_loss_weight: got 0.3" in error and "domains.math.sampling.speculative" in error
    code, _, error = call("plan", "+stage=all", "model=v32_tiny", "engine.quantization.kv=true")
    assert code == 2 and "engine.quantization.kv" in error
