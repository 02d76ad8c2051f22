"""One training rank: a model under DeepSpeed, the frozen models its losses compare with, and the generator that shares its weights."""

from __future__ import annotations

import logging
import math
import os
import resource
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read by deepspeed on import; a GPU cluster's configuration sets it first

import deepspeed
import torch
import torch.distributed as dist
from torch.profiler import record_function

from domains.types import Prompt, Sample
from model import weights
from model.cpu import keep_freed_memory, prefer_onednn
from model.kernels.choice import choose
from model.kernels.logprob.op import token_logprobs
from model.tokenizer import Tokenizer
from model.transfer import send
from model.transformer import Transformer
from runtime.batch import Batch
from runtime.clipping import Clipping, all_finite, as_configured, read
from runtime.config import SamplingConfig
from runtime.deepspeed_config import deepspeed_config, looks_at_gradients
from runtime.generation.engine import Generator
from runtime.objective import Objective, row_tensors
from runtime.optim import HybridOptimizer
from runtime.spec import EngineSpec, LossSpec
from runtime.zero_layouts import layouts_of

logger = logging.getLogger(__name__)

SKIPPED_IN_A_ROW = 3
"""Steps without finite gradients that are skipped before the run is given up."""


class Engine:
    """One rank. Every method is called on all ranks together, each with its own share."""

    def __init__(self, spec: EngineSpec, rank: int = 0) -> None:
        self.spec, self.rank = spec, rank
        self._skipped = 0
        torch.set_num_threads(spec.threads)
        choose(None if spec.kernels == "auto" else spec.kernels)
        prefer_onednn()
        keep_freed_memory()
        join_ranks(spec, rank)
        self.device = torch.device(deepspeed.accelerator.get_accelerator().current_device_name())
        self.dtype = torch.bfloat16 if spec.deepspeed.get("bf16", {}).get("enabled") else torch.float32
        model = self._load(spec.model)
        self.tokenizer = Tokenizer.load(Path(spec.model))
        freeze(model, train_mtp=spec.train_mtp, train_indexer=spec.train_indexer)
        self.objective = Objective(model)
        optimizer = HybridOptimizer(model.named_parameters(), spec.optimizer)
        config, most = deepspeed_config(spec)
        self._deepspeed_looks = looks_at_gradients(config)
        self.deepspeed, *_ = deepspeed.initialize(model=self.objective, optimizer=optimizer, config=config)
        self.stage = self.deepspeed.zero_optimization_stage()
        self.optimizer = optimizer
        optimizer.layouts = layouts_of(self.deepspeed.optimizer, self.stage)
        self._clipping = None if most is None else Clipping(self.deepspeed.optimizer, optimizer.layouts, most=most)
        self.frozen = {name: self._load(path).requires_grad_(False).eval() for name, path in spec.frozen.items()}
        for each in (model, *self.frozen.values()):
            each.quantize(**asdict(spec.quantization))
        self.generator = Generator(model, self.tokenizer, spec.domains, spec.sandbox)

    @property
    def model(self) -> Transformer:
        """The policy; the generator samples from these very parameters."""
        return self.objective.model

    def train_step(
        self, batches: Sequence[Batch], loss: LossSpec, denominator: float, *, lr: float, router_bias_speed: float = 0.0
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Follow the gradient of sum(loss) / denominator over all ranks' rows, then nudge the routers' biases.

        A GPU may still be at work when this returns. A step whose gradients are not finite changes nothing; it is counted in
        `actor/skipped`.

        Returns:
            this rank's metric sums, and what was measured of the optimizer step, the same on all ranks.

        Raises:
            RuntimeError: the gradients of `SKIPPED_IN_A_ROW` steps one after the other were not finite.
        """
        with record_function("forward_backward"):
            metrics = self._forward_backward(batches, loss, denominator)
        with record_function("optim_step"):
            values, norm = self._optim_step([value for parts in metrics.values() for value in parts], lr)
            applied = norm is None or math.isfinite(norm)
            self._count_skipped(applied)
            if router_bias_speed and applied:
                self._nudge_routers(router_bias_speed)
        left = iter(values)
        sums = {name: sum(islice(left, len(parts))) for name, parts in metrics.items()}
        measured = {} if norm is None else {"actor/grad_norm": norm}
        return sums, {"actor/lr": lr} | (measured if applied else {"actor/skipped": 1.0})

    def _forward_backward(self, batches: Sequence[Batch], loss: LossSpec, denominator: float) -> dict[str, list[torch.Tensor]]:
        """Accumulate gradients; returns each metric's sum over each row, which nobody has waited for yet."""
        measured: dict[str, list[torch.Tensor]] = {}
        for batch in batches:
            self.deepspeed.train(batch.target_count > 0)  # a row that only keeps ranks in step must not count as the routers' load
            teacher = self.frozen[batch.teacher] if batch.teacher else None
            value = self.deepspeed(batch, loss, denominator, teacher)
            # DeepSpeed averages gradients over ranks; the loss is a share of a global mean, so the average is undone here.
            self.deepspeed.backward(value * self.spec.ranks, scale_wrt_gas=False)
            for name, metric in self.objective.metrics.items():
                measured.setdefault(name, []).append(metric)
        return measured

    def _optim_step(self, metrics: Sequence[torch.Tensor], lr: float) -> tuple[list[float], float | None]:
        """Apply the gradients; returns the metrics' values, and the norm: not finite where nothing changed, None where nobody tells."""
        norm: float | None
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if self._clipping is not None:
            self._clipping.begin(metrics)
            self.deepspeed.step()
            values, norm = self._clipping.end()
        else:
            # From stage 2 on the gradients are gone by now.
            applied = self._deepspeed_looks or all_finite([p.grad for p in self.model.parameters() if p.grad is not None])
            if applied:
                self.deepspeed.step()
                applied = self.deepspeed.was_step_applied()
            told = self.deepspeed.get_global_grad_norm() if applied else math.inf
            values, norm = read(metrics), None if told is None else float(told)
        assert len(values) == len(metrics), f"read {len(values)} values of {len(metrics)} metrics"
        self.deepspeed.zero_grad()
        return values, norm

    def _nudge_routers(self, speed: float) -> None:
        """Move the routers' biases by the load on all ranks."""
        load = self.model.router_load()
        if self.spec.ranks > 1:
            dist.all_reduce(load)
        self.model.update_router_bias(speed, load)

    def _count_skipped(self, applied: bool) -> None:
        self._skipped = 0 if applied else self._skipped + 1
        if not applied:
            logger.warning("gradients that are not finite: this step changes nothing (%d in a row)", self._skipped)
        if self._skipped == SKIPPED_IN_A_ROW:
            raise RuntimeError(
                f"the gradients of {SKIPPED_IN_A_ROW} steps in a row were not finite: the model has diverged. "
                "Lower the learning rate or grad_clip, and go on from an earlier checkpoint or start the step anew"
            )

    @torch.no_grad()
    def logprobs(self, batches: Sequence[Batch], model: str = "") -> list[Any]:
        """Log-probs [R] float32, nats, of each row's targets under the policy, or under the frozen model of that name."""
        self.deepspeed.eval()
        net = self.frozen[model] if model else self.model
        out = []
        with self._whole_weights():
            for batch in batches:
                row = row_tensors(batch, self.device, share=True)
                where = send(torch.from_numpy(batch.targets.nonzero()[0]), row[0].device)
                out.append(token_logprobs(net(*row).last[where - 1], net.head.weight, row[0][where])[0])
        return [values.cpu().numpy() for values in out]

    def generate(self, prompts: Sequence[Prompt], seeds: Sequence[int], sampling: SamplingConfig, *, samples: int) -> list[Sample]:
        """Sample `samples` answers a prompt, in prompt order; `seeds` hold one stream a prompt."""
        self.deepspeed.eval()
        with self._whole_weights():
            return self.generator.generate(prompts, seeds, sampling, samples=samples)

    def save(self, directory: str) -> None:
        """Write this rank's share of model, optimizer and random state into a directory that all ranks share."""
        client = {"torch_rng": torch.get_rng_state(), "spec": asdict(self.spec.optimizer)}
        self.deepspeed.save_checkpoint(directory, tag="ranks", client_state=client, save_latest=False)

    def load(self, directory: str) -> None:
        """Restore what `save` wrote with the same number of ranks; the configuration alone says how to clip."""
        with as_configured(self.deepspeed.optimizer):
            path, client = self.deepspeed.load_checkpoint(directory, tag="ranks")
        if path is None:
            raise ValueError(f"{directory}: holds no checkpoint for {self.spec.ranks} ranks at ZeRO stage {self.stage}")
        torch.set_rng_state(client["torch_rng"])

    def export(self, directory: str) -> None:
        """Write the model and its tokenizer for the next step; rank 0 writes."""
        with self._whole_weights():
            if self.rank == 0:
                weights.save(self.model, Path(directory))
                self.tokenizer.save(Path(directory))

    def peak_memory_gib(self) -> float:
        """Return the most memory that this rank has held: allocated on its GPU, or resident in its process on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

    def close(self) -> None:
        """Release the generator's environments and leave the process group."""
        self.generator.close()
        if dist.is_initialized():
            dist.destroy_process_group()

    def _load(self, directory: str) -> Transformer:
        return weights.load(Path(directory), dtype=self.dtype, device=self.device)

    def _whole_weights(self) -> Any:
        """Under ZeRO 3, gather the parameters for the duration; otherwise they are whole already.

        ZeRO 3's hooks go meanwhile: after a module's forward they drop its parameters, which decoding reads without calling the module.
        """
        return deepspeed.zero.unwrap_model_for_generation(self.deepspeed) if self.stage == 3 else nullcontext()


def freeze(model: Transformer, *, train_mtp: bool, train_indexer: bool) -> None:
    """Exclude what no loss reaches: unless they are trained, the indexers (their top-k passes no gradient) and the MTP block.

    Left in, ZeRO would give them zero gradients, and weight decay would wear them away.
    """
    for name, parameter in model.named_parameters():
        if ".indexer." in name:
            parameter.requires_grad_(train_indexer)
        elif name.startswith("mtp."):
            parameter.requires_grad_(train_mtp)


def join_ranks(spec: EngineSpec, rank: int) -> None:
    """Set up the process group under DeepSpeed, on gloo for the CPU and NCCL for GPUs."""
    cpu = deepspeed.accelerator.get_accelerator().device_name() == "cpu"
    if cpu:
        # Its shared-memory all-reduce is compiled with g++ at first use; gloo does the same work without a compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # Ray shows every rank its own GPU alone, as device 0.
    os.environ.update(LOCAL_RANK="0", RANK=str(rank), WORLD_SIZE=str(spec.ranks))
    deepspeed.init_distributed(
        dist_backend="gloo" if cpu else "nccl",
        init_method=spec.rendezvous,
        rank=rank,
        world_size=spec.ranks,
        auto_mpi_discovery=False,
        verbose=False,
    )
