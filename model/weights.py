"""A model on disk: read a checkpoint of any known layout, write one for the next step, an inference engine, or transformers."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from model.checkpoints import files, reading, settings, writing
from model.transformer import Transformer

logger = logging.getLogger(__name__)

CONFIG, TENSORS, INDEX = settings.CONFIG, files.TENSORS, files.INDEX


def load(path: Path, *, dtype: torch.dtype | None = torch.float32, device: torch.device | str = "cpu") -> Transformer:
    """Read a model from a directory: the release's files, transformers', or ours; which, is seen from the names and dtypes in them.

    FP8 and FP4 are turned into `dtype`, which holds them exactly if it is bf16 or fp32. Beside the model at most a window of one file is
    held (`files.WINDOW_BYTES`).

    Args:
        path: directory with `config.json` and `model.safetensors`, or shards and their index.
        dtype: of the parameters; those that the release keeps in fp32 (hyper-connections, sinks, `ape`, router biases) stay fp32. None
            takes bf16 where the files hold nothing wider, else fp32.
        device: where the model is to be.

    Raises:
        ValueError: files are missing or damaged, the configuration contradicts itself, the tokenizer has more tokens than the embedding
            rows, tensors are missing, unexpected or misshapen, or scales are NaN; with files, fields, values and what was expected, before
            memory is allocated for the model.
        FileNotFoundError: there is no checkpoint.
    """
    path = Path(path)
    config = settings.read_config(path)
    settings.check_tokenizer(path, config)
    plan = reading.plan(path, config)
    return reading.fill(plan, dtype=dtype, device=torch.device(device))


def save(model: Transformer, path: Path, *, layout: str = "native", precision: str | None = None, companions: Path | None = None) -> None:
    """Write a model into the directory `path`, all of it or nothing.

    Args:
        model: what to write; one that was loaded from quantised files and not changed since gives the same bytes again.
        path: a directory, made if needed; files of a checkpoint that is there already are replaced.
        layout: `native` as steps hand it on, routed experts stacked; `official` as released; `transformers` as that library saves it.
        precision: `fp4` (routed experts FP4, other matrices FP8), `fp8`, `bf16` or `fp32`; what the release keeps above stays above. None
            writes the official layout as it was loaded, or else as the release is, and the other layouts in the dtypes in memory.
        companions: directory whose tokenizer files are copied along.

    Raises:
        ValueError: no such layout or precision, or numbers that are not finite.
        OSError: the disk is full or broken; nothing is written.
    """
    with files.staged(Path(path)) as directory:
        stored = writing.write_tensors(model, directory, layout=layout, precision=precision)
        settings.write_config(directory, model.config, layout=layout, formats=stored)
        if companions is not None:
            settings.copy_companions(Path(companions), directory)
    logger.info("%s: written in the %s layout (%s)", path, layout, ", ".join(sorted(stored)))
