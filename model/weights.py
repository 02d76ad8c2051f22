"""A model on disk: `config.json` and `model.safetensors`, under the release's names with routed experts stacked."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from model.config import ModelConfig
from model.transformer import Transformer

CONFIG, TENSORS = "config.json", "model.safetensors"


def save(model: Transformer, path: Path) -> None:
    """Write `model` into the directory `path`, made if needed; not atomic, whoever commits the directory makes it so."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    (path / CONFIG).write_text(json.dumps(model.config.to_dict(), indent=2) + "\n")
    tensors = {name: value.detach().to("cpu").contiguous() for name, value in model.state_dict().items()}
    save_file(tensors, path / TENSORS)


def load(path: Path) -> Transformer:
    """Read a model from the directory `path`, in fp32 on the CPU.

    Raises:
        ValueError: the files are damaged, the configuration contradicts itself, or tensors are missing, unexpected or misshapen; all of
            them are named together.
        FileNotFoundError: there is no model.
    """
    path = Path(path)
    model = Transformer(ModelConfig.from_file(path / CONFIG))
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    if not (path / TENSORS).is_file():
        raise FileNotFoundError(path / TENSORS)
    try:
        with safe_open(path / TENSORS, framework="pt") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        tensors = load_file(path / TENSORS)
    except SafetensorError as error:
        raise ValueError(f"{path / TENSORS}: damaged: {error}") from error
    problems = [f"missing {name}" for name in expected.keys() - found.keys()]
    problems += [f"unexpected {name}" for name in found.keys() - expected.keys()]
    problems += [
        f"{name}: got shape {found[name]}, expected {expected[name]}"
        for name in expected.keys() & found.keys()
        if found[name] != expected[name]
    ]
    if problems:
        raise ValueError(f"{path / TENSORS}: " + "; ".join(sorted(problems)))
    with torch.no_grad():
        model.load_state_dict(tensors)
    return model
