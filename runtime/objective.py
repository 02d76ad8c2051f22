"""Where a model meets a loss on one packed row: the module that DeepSpeed wraps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from model.kernels.logprob.op import token_logprobs
from model.transfer import send
from model.transformer import Transformer
from runtime.batch import Batch
from runtime.spec import LossSpec

PAD_TOKENS = 128
"""Rows are filled up to a multiple of this."""


class Rows(NamedTuple):
    """The positions of a packed row that predict a target, R of them.

    Attributes:
        hidden: [R, D] hidden states that predict the targets.
        targets: [R] int64.
        fields: name to [R] float32.
        sample: [R] int64, which sample of the row each belongs to.
        samples: number of samples in the row.
        teacher: the frozen model's hidden states [R, D'] and head [V, D'], or None.
    """

    hidden: Tensor
    targets: Tensor
    fields: dict[str, Tensor]
    sample: Tensor
    samples: int
    teacher: tuple[Tensor, Tensor] | None


class Objective(nn.Module):
    """A model together with the loss of the moment.

    `forward` returns the row's share of the step's mean loss; what it measured on the way is in `metrics` as sums.
    """

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model
        self.device = model.embed.weight.device  # once: reading the parameter in a forward pass would keep it gathered under ZeRO 3
        self.metrics: dict[str, Tensor] = {}

    def forward(self, batch: Batch, spec: LossSpec, denominator: float, teacher: Transformer | None) -> Tensor:
        """Compute the loss of one packed row.

        Args:
            batch: the row.
            spec: which loss.
            denominator: targets of the whole step over all ranks; the loss sum is divided by it.
            teacher: the frozen model that the row's loss compares with.

        Returns:
            [] fp32, requires grad also for a row without targets.
        """
        row = row_tensors(batch, self.device, share=not (spec.balance_weight or spec.mtp_weight))
        tokens, cu_seqlens, _ = row
        hidden = self.model(*row, indexer=spec.indexer)
        targets = torch.from_numpy(batch.targets.nonzero()[0])
        rows = target_rows(batch, row, targets=targets, last=hidden.last, teacher=teacher)
        loss = spec.resolve()
        total, metrics = self.model.head(rows.hidden, lambda h, weight: loss(rows._replace(hidden=h), weight, **spec.options))
        total = total / denominator
        if spec.balance_weight:
            total = total + spec.balance_weight * hidden.balance_loss * (batch.target_count / denominator)
            metrics["balance_loss"] = hidden.balance_loss.detach() * batch.target_count
        if spec.indexer:
            total = total + spec.indexer_weight * hidden.indexer_loss * (batch.target_count / denominator)
            metrics["indexer_loss"] = hidden.indexer_loss.detach() * batch.target_count
        if spec.mtp_weight:
            mtp_total = self._mtp(hidden, tokens, cu_seqlens, targets)
            total = total + spec.mtp_weight * mtp_total / denominator
            metrics["mtp_loss"] = mtp_total.detach()
        self.metrics = {name: value.detach() for name, value in metrics.items()}
        return total

    def _mtp(self, hidden: Any, tokens: Tensor, cu_seqlens: Tensor, targets: Tensor) -> Tensor:
        """Sum the MTP block's cross-entropy over targets that lie two tokens behind some token of their sample."""
        sample = torch.searchsorted(cu_seqlens, targets, right=True) - 1
        reachable = send(targets[targets - 2 >= cu_seqlens[sample]], tokens.device)
        states = self.model.mtp_hidden(hidden, tokens, cu_seqlens)[reachable - 2]
        return self.model.head(states, lambda h, weight: -token_logprobs(h, weight, tokens[reachable])[0].sum())


def row_tensors(batch: Batch, device: torch.device, *, share: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return what a model's forward takes: tokens [T], and on the host cu_seqlens [N + 1] and source [T] or None, padded.

    Args:
        batch: the row.
        device: of the tokens.
        share: compute what samples share once; a loss that counts every token of every sample (balance, MTP) must not.
    """
    tokens, cu_seqlens, source = padded(batch if share else replace(batch, source=None))
    # Copies: what Ray delivers cannot be written to, which a tensor cannot say.
    return send(torch.tensor(tokens), device), torch.tensor(cu_seqlens), None if source is None else torch.tensor(source)


def target_rows(
    batch: Batch, row: tuple[Tensor, Tensor, Tensor | None], *, targets: Tensor, last: Tensor, teacher: Transformer | None
) -> Rows:
    """Gather what a loss sees of a row.

    Args:
        batch: the row.
        row: the same as `row_tensors` returns it.
        targets: [R] int64 on the host, where the targets lie in the row.
        last: [T, D] the model's hidden states.
        teacher: the frozen model to compare with.
    """
    tokens, cu_seqlens, _ = row
    places, where = targets.numpy(), send(targets, tokens.device)
    return Rows(
        hidden=last[where - 1],
        targets=tokens[where],
        fields={name: send(torch.from_numpy(values[places]), tokens.device) for name, values in batch.fields.items()},
        sample=send(torch.searchsorted(cu_seqlens, targets, right=True) - 1, tokens.device),
        samples=len(batch.cu_seqlens) - 1,
        teacher=None if teacher is None else teacher_states(teacher, row, where),
    )


def padded(batch: Batch) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64] | None]:
    """Fill a row up to a multiple of `PAD_TOKENS`, computed and in all, with samples made of the row's own tokens and without targets.

    Matrix libraries prepare a kernel for each new shape; rows of a few lengths only keep them from doing it at every step. The filling
    resembles the row so that the routers' load, which counts it, does too.

    Returns:
        tokens [T'], cu_seqlens [N' + 1] and source [T'] or None.
    """
    tokens, cu_seqlens, source = batch.tokens, batch.cu_seqlens, batch.source
    if missing := -batch.computed % PAD_TOKENS:
        if source is not None:
            source = np.concatenate([source, batch.computed + np.arange(missing)])
        tokens, cu_seqlens = np.concatenate([tokens, np.resize(tokens, missing)]), np.append(cu_seqlens, len(tokens) + missing)
    if source is not None and (missing := -len(tokens) % PAD_TOKENS):
        # These stand for a token that is computed anyway; no one sees them and nothing reads them.
        source = np.concatenate([source, np.zeros(missing, np.int64)])
        tokens, cu_seqlens = np.concatenate([tokens, np.resize(tokens[:1], missing)]), np.append(cu_seqlens, len(tokens) + missing)
    return tokens, cu_seqlens, source


@torch.no_grad()
def teacher_states(teacher: Transformer, row: tuple[Tensor, Tensor, Tensor | None], where: Tensor) -> tuple[Tensor, Tensor]:
    """Return a frozen model's hidden states [R, D] that predict the tokens at `where`, and its head [V, D]."""
    return teacher(*row).last[where - 1], teacher.head.weight.detach()
