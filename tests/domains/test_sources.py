"""Tasks from files: the same rows as JSONL and Parquet, graded like made-up ones, and malformed rows named to the field."""

import json

import pytest

from domains.agent_tasks import TOOLS, AgentTasks
from domains.catalog import make_domain
from domains.code_tasks import CodeTasks
from domains.config import DomainConfig, SandboxConfig
from domains.math_tasks import MathTasks
from domains.procedural import split_of
from domains.sources import FileSource
from domains.types import Sample

MATH = {"prompt": "1+1?", "answer": "2", "response": "\\boxed{2}", "reasoning": "Sum."}
CODE = {"prompt": "Write f.", "function": "f", "cases": [{"input": [1], "expected": [1]}, {"input": [2], "expected": "x"}]}
AGENT = {
    "prompt": "Cancel 3.",
    "database": {"customers": [[1, "Ada"]], "products": [[2, "lamps", 5, 0]], "orders": [[3, 1, 2, 4]], "next_order_id": 9},
    "expected": {"customers": [[1, "Ada"]], "products": [[2, "lamps", 5, 4]], "orders": []},
    "facts": [3, 20],
}
ROWS = {"math": MATH, "code": CODE, "agent": AGENT}
MADE_UP = {"math": MathTasks, "code": CodeTasks, "agent": AgentTasks}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_parquet(path, rows):
    import datasets

    text = [{key: json.dumps(value) if isinstance(value, dict | list) else value for key, value in row.items()} for row in rows]
    datasets.Dataset.from_list(text).to_parquet(str(path))
    return str(path)


def exported(kind):
    """Made-up demonstrations as rows of the schema."""
    fields = {"math": ("answer",), "code": ("function", "cases"), "agent": ("database", "expected", "facts")}[kind]
    for demonstration in MADE_UP[kind](kind, difficulty=1, diligence=1.0).demonstrations(6, seed=0):
        messages = [{"role": m["role"], "content": m["content"]} for m in demonstration.prompt.messages]
        truth = {field: demonstration.prompt.truth[field] for field in fields}
        yield {"messages": messages, "turns": demonstration.messages, "split": "train"} | truth


@pytest.mark.parametrize("kind", MADE_UP)
def test_exported_tasks_come_back_and_earn_1(kind, tmp_path):
    path = write(tmp_path / "rows.jsonl", exported(kind))
    domain = make_domain(kind, DomainConfig(kind=kind, source=path), SandboxConfig())
    original = MADE_UP[kind](kind, difficulty=1, diligence=1.0).demonstrations(6, seed=0)
    read = domain.demonstrations(6, seed=1)
    assert {d.prompt.messages[-1]["content"] for d in read} == {d.prompt.messages[-1]["content"] for d in original}
    environment, samples = domain.environment(), []
    for d in read:
        outcome = {}
        if environment is not None:
            (handle,) = environment.open([d.prompt])
            for turn in d.messages:
                if turn["role"] == "assistant":
                    environment.respond([(handle, turn)])
            (outcome,) = environment.finish([handle])
        samples.append(Sample(d.prompt, [], [], [], messages=d.messages, outcome=outcome))
    assert [v.reward for v in domain.grade(samples)] == [1.0] * 6
    if environment is not None:
        environment.close()
    domain.close()


@pytest.mark.parametrize("kind", MADE_UP)
def test_parquet_and_jsonl_agree(kind, tmp_path):
    rows = list(exported(kind))
    lines = FileSource(kind, kind, write(tmp_path / "rows.jsonl", rows))
    table = FileSource(kind, kind, write_parquet(tmp_path / "rows.parquet", rows))
    assert lines.prompts("train", 9, seed=0) == table.prompts("train", 9, seed=0)
    assert lines.demonstrations(9, seed=0) == table.demonstrations(9, seed=0)


def test_a_hub_dataset_is_read_by_its_splits(tmp_path, monkeypatch):
    import datasets

    splits = {"train": datasets.Dataset.from_list([MATH]), "test": datasets.Dataset.from_list([MATH | {"prompt": "2+2?", "answer": "4"}])}
    monkeypatch.setattr("datasets.load_dataset", lambda name: splits if name == "owner/name" else None)
    source = FileSource("math", "math", "owner/name")
    assert [p.truth for p in source.prompts("train", 5, seed=0)] == [{"answer": "2"}]
    assert [p.truth for p in source.prompts("heldout", 5, seed=0)] == [{"answer": "4"}]


def test_without_a_split_the_prompt_decides(tmp_path):
    path = write(tmp_path / "rows.jsonl", [MATH | {"prompt": f"{n}+0?", "answer": n} for n in range(200)])
    source = FileSource("math", "math", path)
    train, heldout = ({p.messages[0]["content"] for p in source.prompts(split, 200, seed=0)} for split in ("train", "heldout"))
    assert len(train) + len(heldout) == 200
    assert not train & heldout
    assert 20 < len(heldout) < 90
    assert all(split_of(json.dumps([{"content": text, "role": "user"}])) == "train" for text in train)
    assert {d.prompt.messages[0]["content"] for d in source.demonstrations(200, seed=0)} == train
    assert source.prompts("train", 30, seed=3) == source.prompts("train", 60, seed=3)[:30] != source.prompts("train", 30, seed=4)


def test_agent_rows_get_the_tools(tmp_path):
    (prompt,) = FileSource("shop", "agent", write(tmp_path / "rows.jsonl", [AGENT | {"split": "train"}])).prompts("train", 1, seed=0)
    assert prompt.messages[0]["tools"] == TOOLS
    assert (prompt.id, prompt.domain) == ("shop/train/1", "shop")


def test_documents_and_blank_lines(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": "1+1=2"}) + "\n\n" + json.dumps(MATH) + "\n")
    source = FileSource("math", "math", str(path))
    assert source.documents(5, seed=0) == ["1+1=2"]


@pytest.mark.parametrize(
    ("kind", "change", "field"),
    [
        ("math", {"answer": None}, "answer"),
        ("math", {"answer": " "}, "answer"),
        ("math", {"answer": 2.5}, "answer"),
        ("math", {"answer": True}, "answer"),
        ("math", {"prompt": ""}, "prompt"),
        ("math", {"prompt": ["x"]}, "prompt"),
        ("math", {"split": "dev"}, "split"),
        ("math", {"response": 3}, "response"),
        ("math", {"messages": []}, "messages"),
        ("math", {"messages": [{"role": "robot", "content": "x"}]}, "messages"),
        ("math", {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}, "messages"),
        ("math", {"messages": "[broken"}, "messages"),
        ("math", {"turns": [{"role": "tool", "content": "x"}]}, "turns"),
        ("math", {"turns": [{"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}]}, "turns"),
        ("code", {"function": "not a name"}, "function"),
        ("code", {"cases": []}, "cases"),
        ("code", {"cases": [{"input": 3, "expected": 4}]}, "cases"),
        ("code", {"cases": [{"input": [3]}]}, "cases"),
        ("agent", {"facts": []}, "facts"),
        ("agent", {"facts": ["3"]}, "facts"),
        ("agent", {"database": {}}, "database"),
        ("agent", {"database": AGENT["database"] | {"next_order_id": None}}, "database"),
        ("agent", {"database": AGENT["database"] | {"customers": [[1, "Ada"], [1, "Ben"]]}}, "database"),
        ("agent", {"database": AGENT["database"] | {"customers": [[1, "\ud800"]]}}, "database"),
        ("agent", {"database": AGENT["database"] | {"products": [[10**30, "x", 1, 1]]}}, "database"),
        ("agent", {"expected": {"customers": [[1]], "products": [], "orders": []}}, "expected"),
    ],
    ids=str,
)
def test_a_malformed_row_is_named(kind, change, field, tmp_path):
    path = write(tmp_path / "rows.jsonl", [ROWS[kind], ROWS[kind] | {"prompt": "other"} | change])
    with pytest.raises(ValueError, match=rf"rows\.jsonl: line 2: {field}: got .*expected"):
        FileSource(kind, kind, path)


@pytest.mark.parametrize(("line", "words"), [("{broken", "not JSON"), ("[1]", "expected an object"), ("[" * 99999, "not JSON")])
def test_a_damaged_line_is_named(line, words, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(MATH) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=rf"rows\.jsonl: line 2: .*{words}"):
        FileSource("math", "math", str(path))


def test_a_prompt_in_both_splits_is_refused(tmp_path):
    path = write(tmp_path / "rows.jsonl", [MATH | {"split": "train"}, MATH | {"split": "test"}])
    with pytest.raises(ValueError, match=r"line 2: split: got 'heldout', expected 'train', as for the same prompt at .*line 1"):
        FileSource("math", "math", path)


def test_a_malformed_parquet_row_is_named(tmp_path):
    path = write_parquet(tmp_path / "rows.parquet", [MATH, MATH | {"prompt": "x", "answer": None}])
    with pytest.raises(ValueError, match=r"rows\.parquet: row 2: answer"):
        FileSource("math", "math", path)


def test_empty_and_missing_sources(tmp_path):
    with pytest.raises(FileNotFoundError):
        FileSource("math", "math", str(tmp_path / "none.jsonl"))
    with pytest.raises(FileNotFoundError):
        FileSource("math", "math", str(tmp_path / "none.parquet"))
    with pytest.raises(ValueError, match="source"):
        make_domain("math", DomainConfig(kind="math", source="proced"), SandboxConfig())
    source = FileSource("math", "math", write(tmp_path / "rows.jsonl", [MATH | {"split": "test"}]))
    with pytest.raises(ValueError, match="train"):
        source.prompts("train", 1, seed=0)
    with pytest.raises(ValueError, match="response"):
        source.demonstrations(1, seed=0)
