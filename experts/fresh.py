"""Write a freshly initialised model to disk."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from model.config import AnyConfig
from model.tokenizer import Tokenizer


def write_fresh_model(directory: Path, config: AnyConfig, tokenizer: Tokenizer, *, seed: int) -> None:
    """Initialise a model from a seed and write it beside its tokenizer, in one rename.

    The vocabulary is cut to what the tokenizer really learned, so that no token without a spelling can be sampled.
    """
    import torch  # heavy; the loops of the other steps do without

    from model import weights
    from model.transformer import Transformer

    temporary = directory.with_name(directory.name + ".tmp")
    temporary.mkdir(exist_ok=True)
    torch.manual_seed(seed)
    weights.save(Transformer(replace(config, vocab_size=tokenizer.vocab_size)), temporary)
    tokenizer.save(temporary)
    os.rename(temporary, directory)
