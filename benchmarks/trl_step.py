"""TRL's side of the GRPO benchmarks, around transformers' model: loaded only where TRL takes part."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from grpo_setting import LEARNING_RATE, Setting
from tokenizers import Tokenizer as WordTokenizer
from tokenizers import models, pre_tokenizers
from transformers import DeepseekV4ForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from model import weights


class Between(TrainerCallback):
    """Calls back before and after every optimizer step."""

    def __init__(self, before: Callable[[], None], after: Callable[[], None]) -> None:
        self.before, self.after = before, after

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Say that TRL is about to sample."""
        self.before()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Say that TRL's weights have moved."""
        self.after()


class TrlGrpo:
    """TRL's trainer; its tokenizer spells each id as a word."""

    def __init__(self, directory: Path, prompt_ids: Sequence[Sequence[int]], setting: Setting) -> None:
        """Load the weights in `directory` into transformers' model, in bf16 throughout on a GPU."""
        self.setting, self.workdir = setting, directory / "trl"
        self.model = transformers_model(directory)
        if setting.device == "cuda":
            self.model.to("cuda", torch.bfloat16)
        self.prompts = [" ".join(f"<{token}>" for token in row) for row in prompt_ids]

    def train(self, steps: int, *, reward: Callable[[Sequence[int]], float], before: Callable[[], None], after: Callable[[], None]) -> None:
        """Run TRL's loop, calling back before and after every optimizer step."""
        setting = self.setting
        settings = GRPOConfig(
            output_dir=str(self.workdir), per_device_train_batch_size=setting.prompts * setting.samples // setting.accumulate,
            gradient_accumulation_steps=setting.accumulate, num_generations=setting.samples, max_steps=steps,
            max_completion_length=setting.new_tokens, generation_kwargs={"min_new_tokens": setting.new_tokens},
            learning_rate=LEARNING_RATE, beta=0.0, use_cpu=setting.device == "cpu", bf16=False, gradient_checkpointing=False,
            save_strategy="no", report_to=[], disable_tqdm=True, logging_strategy="no",
        )  # fmt: skip

        def rewards(completion_ids: list[list[int]], **_: Any) -> list[float]:
            lengths = {len(row) for row in completion_ids}
            assert lengths == {setting.new_tokens}, lengths
            return [reward(row) for row in completion_ids]

        trainer = GRPOTrainer(
            model=self.model,
            reward_funcs=rewards,
            args=settings,
            train_dataset=Dataset.from_dict({"prompt": self.prompts}),
            processing_class=word_tokenizer(self.model.config.vocab_size),
        )
        trainer.add_callback(Between(before, after))
        trainer.train()


def transformers_model(directory: Path) -> DeepseekV4ForCausalLM:
    """Load the weights in `directory` into transformers' model, fp32 on the CPU, by way of an export in its layout."""
    ours = weights.load(directory)
    with tempfile.TemporaryDirectory() as exported:
        weights.save(ours, Path(exported), layout="transformers")
        model, about = DeepseekV4ForCausalLM.from_pretrained(exported, dtype=torch.float32, output_loading_info=True)
    assert not about["missing_keys"] and not about["unexpected_keys"], about
    model.config.num_experts = ours.config.n_routed_experts  # the trainer's mixture-of-experts check reads this name
    return model


def word_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer that reads "<7>" as token 7."""
    words = WordTokenizer(models.WordLevel({f"<{i}>": i for i in range(vocabulary)}, unk_token="<2>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<0>", eos_token="<1>", pad_token="<1>", unk_token="<2>", padding_side="left"
    )
