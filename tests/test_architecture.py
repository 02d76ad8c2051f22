"""The house rules that a machine can check: layers, cycles, homes of heavy packages, module size, a light start."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "pipeline": {"experts", "distill", "rl", "runtime", "domains", "model"},
    "experts": {"rl", "runtime", "domains", "model"},
    "distill": {"runtime", "domains", "model"},
    "rl": {"runtime", "domains", "model"},
    "runtime": {"domains", "model"},
    "domains": set(),
    "model": set(),
}
HOMES = {
    "hydra": {"pipeline"},
    "omegaconf": {"pipeline"},
    "ray": {"runtime/cluster.py", "pipeline/workflow.py", "pipeline/failure.py", "pipeline/__main__.py"},
    "deepspeed": {"runtime/engine.py"},
    "wandb": {"runtime/tracking.py"},
    "datasets": {"domains"},
    "triton": {"model/kernels"},
    "transformers": {"model/tokenizer.py"},
    "tokenizers": {"model/tokenizer.py"},
    "math_verify": {"domains/math_grader.py"},
    "numba": {"model/kernels"},
    "llvmlite": {"model/kernels"},
}
MODULES = sorted(path for layer in MAY_IMPORT for path in (ROOT / layer).rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Every absolute module name that a file imports, lazily or not."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_down(path):
    layer = path.relative_to(ROOT).parts[0]
    others = {name.split(".")[0] for name in imports(path)} & MAY_IMPORT.keys() - {layer}
    assert others <= MAY_IMPORT[layer]


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_heavy_packages_stay_at_home(path):
    place = path.relative_to(ROOT).as_posix()
    for package in {name.split(".")[0] for name in imports(path)} & HOMES.keys():
        assert any(place == home or place.startswith(home + "/") for home in HOMES[package]), f"{package} has no home in {place}"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_modules_are_small_and_packages_empty(path):
    limit = 500 if "kernels" in path.parts else 400
    assert len(path.read_text().splitlines()) <= limit
    if path.name == "__init__.py":
        body = ast.parse(path.read_text()).body
        assert all(isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) for node in body)


def test_no_import_cycles():
    graph = {name_of(path): set() for path in MODULES}
    for path in MODULES:
        for node in ast.parse(path.read_text()).body:  # what is imported inside a function cannot close a cycle
            names = imports_of_node(node)
            graph[name_of(path)] |= {name for name in names if name in graph and name != name_of(path)}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail, name])
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def imports_of_node(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
        return {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return set()


def test_planning_loads_nothing_heavy():
    program = "import sys, pipeline.config, pipeline.stages, pipeline.plan; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT).stdout.split()
    assert not {"torch", "ray", "deepspeed", "wandb", "datasets", "matplotlib", "transformers"} & set(loaded)


def test_loops_do_without_torch():
    program = "import sys, rl.loop, distill.loop, experts.sft, experts.pretrain; print('torch' in sys.modules, 'deepspeed' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert out.split() == ["False", "False"]
