"""Keys change with what can change a result, and with nothing else."""

import pytest

from pipeline.stages import steps


def keys(config) -> dict[str, str]:
    return {step.name: step.key for step in steps(config)}


def test_every_step_comes_after_its_needs(configure):
    seen = set()
    for step in steps(configure()):
        assert set(step.needs) <= seen
        seen.add(step.name)
    assert len(seen) == 9


@pytest.mark.parametrize(
    ("stage", "names"),
    [
        ("base", {"base"}),
        ("experts", {"base", "sft-math", "sft-code", "sft-agent", "grpo-math", "grpo-code", "grpo-agent"}),
        ("distill", {"base", "sft-math", "sft-code", "sft-agent", "grpo-math", "grpo-code", "grpo-agent", "warmup", "distill"}),
    ],
)
def test_a_stage_brings_what_it_needs(configure, stage, names):
    assert set(keys(configure(f"+stage={stage}"))) == names


def test_a_student_that_starts_from_the_base_needs_no_warmup(configure):
    found = {step.name: step for step in steps(configure("distill.init=base"))}
    assert "warmup" not in found
    assert found["distill"].job.start == "base"


@pytest.mark.parametrize(
    "override",
    [
        "cluster.ranks=2",
        "cluster.dashboard=false",
        "engine=zero1",
        "engine.row_tokens=512",
        "tracking=offline",
        "run=other",
        "sandbox.slots=3",
        "base.save_every=7",
    ],
)
def test_resources_paths_and_tracking_leave_the_keys_alone(configure, override):
    assert keys(configure(override)) == keys(configure())


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        ("distill.steps=7", {"distill"}),
        ("domains.math.grpo.steps=7", {"grpo-math", "distill"}),
        ("domains.code.sft.optimizer.lr=0.5", {"sft-code", "grpo-code", "distill"}),
        ("warmup.steps=7", {"warmup", "distill"}),
        ("seed=7", "all"),
        ("evaluation.prompts=7", "all"),
        ("+engine.deepspeed.bf16.enabled=true", "all"),
    ],
)
def test_a_change_reaches_the_steps_that_follow_from_it(configure, override, changed):
    before, after = keys(configure()), keys(configure(override))
    assert {name for name in before if before[name] != after[name]} == (set(before) if changed == "all" else changed)


def test_a_source_file_counts_by_its_content(configure, tmp_path):
    source = tmp_path / "tasks.jsonl"
    source.write_text("{}\n")
    first = keys(configure(f"domains.math.domain.source={source}"))
    source.write_text("{}\n{}\n")
    second = keys(configure(f"domains.math.domain.source={source}"))
    assert first["sft-math"] != second["sft-math"]
