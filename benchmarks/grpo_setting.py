"""What the GRPO benchmarks time, whoever runs it: the model, its prompts and its rewards; and what is timed on a GPU."""

from __future__ import annotations

import hashlib
import random
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from domains.types import Prompt
from model import weights
from model.config import ModelConfig
from model.tokenizer import Tokenizer
from model.transformer import Transformer
from runtime.generation.conversation import prompt_tokens

ROOT = Path(__file__).resolve().parent.parent
LEARNING_RATE = 1e-4
LOGIT_SPREAD = 6.8
"""Standard deviation of the fresh head's logits: samples differ, and EOS, whose logit is 0, lies some 18 nats below the likely tokens."""


@dataclass(frozen=True)
class Setting:
    """What is timed.

    Attributes:
        config: the architecture.
        prompts, samples: of one step.
        prompt_tokens, new_tokens: of one sample.
        rows: samples decoded together.
        row_tokens: of a packed row.
        accumulate: parts that TRL trains a step in.
        batches: tokens of the supervised batches.
        length: tokens of a supervised sample.
        device: "cuda" (bf16) or "cpu" (fp32).
    """

    config: ModelConfig
    prompts: int = 64
    samples: int = 8
    prompt_tokens: int = 64
    new_tokens: int = 64
    rows: int = 512
    row_tokens: int = 32768
    accumulate: int = 4
    batches: tuple[int, ...] = (32768, 65536, 131072)
    length: int = 512
    device: str = "cuda"

    @property
    def sampled(self) -> int:
        """Tokens that one step samples."""
        return self.prompts * self.samples * self.new_tokens

    @property
    def deepspeed(self) -> dict[str, Any]:
        """DeepSpeed's keys: on a GPU those that the pipeline runs with."""
        if self.device == "cpu":
            return {"zero_optimization": {"stage": 1}}
        return yaml.safe_load((ROOT / "conf/engine/gpu.yaml").read_text())["deepspeed"]


def reward(tokens: Sequence[int]) -> float:
    """Grade a completion by a hash of it: a number in [0, 1) that no two different completions share, so that every sample teaches."""
    return int.from_bytes(hashlib.blake2b(bytes(str(list(tokens)), "ascii"), digest_size=4).digest()) / 2**32


def architecture(name: str) -> ModelConfig:
    """Read conf/model/`name`.yaml, without the MTP block, which transformers' model lacks."""
    values = yaml.safe_load((ROOT / f"conf/model/{name}.yaml").read_text())
    del values["defaults"]
    ratios = values.pop("compress_ratios")[: values["num_hidden_layers"]]
    return ModelConfig(**values, compress_ratios=ratios, num_nextn_predict_layers=0)


def write_model(directory: Path, config: ModelConfig) -> Tokenizer:
    """Write a model whose end of sentence is never sampled, and its tokenizer."""
    draw = random.Random(0)
    words = ["".join(draw.choices(string.ascii_lowercase, k=4)) for _ in range(200)]
    tokenizer = Tokenizer.train([" ".join(draw.choices(words, k=2000))], config.vocab_size)
    if tokenizer.vocab_size != config.vocab_size:
        raise ValueError(f"tokenizer: learned {tokenizer.vocab_size} tokens, expected {config.vocab_size}")
    torch.manual_seed(0)
    model = Transformer(config)
    with torch.no_grad():
        model.head.weight.mul_(LOGIT_SPREAD / (config.initializer_range * config.hidden_size**0.5))
        model.head.weight[tokenizer.eos] = 0
    weights.save(model, directory)
    tokenizer.save(directory)
    return tokenizer


def make_prompts(tokenizer: Tokenizer, count: int, *, tokens: int) -> list[Prompt]:
    """Return prompts of exactly `tokens` tokens as the generator encodes them."""
    draw = random.Random(1)
    found: list[Prompt] = []
    while len(found) < count:
        letters = "".join(draw.choices(string.ascii_lowercase, k=4 * tokens))
        for length in range(tokens // 2, len(letters)):
            messages = [{"role": "user", "content": letters[:length]}]
            if (encoded := len(prompt_tokens(tokenizer, messages, "thinking"))) == tokens:
                found.append(Prompt(f"math/train/{len(found)}", "math", messages, {}))
            if encoded >= tokens:
                break
    return found
