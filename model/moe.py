"""Feed-forward networks: dense, or a shared expert beside routed ones chosen by a learned score or by the token's id."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from model.config import AnyConfig
from model.kernels.choice import implementation_for
from model.kernels.experts.op import routed_experts, swiglu
from model.kernels.router.rule import Rule
from model.layout import PackedRow
from model.linear import linear, stacked_linear
from model.quant.qat import fake_quantize_mxfp4

_HASH_SEED = 20260424
"""Seed of the hash tables of a model trained from scratch; ours, the release's recipe is unpublished."""


class Gate(nn.Module):
    """Choose the experts of each token and weigh them by the learned score.

    s = sqrt(softplus(x W^T)) or sigmoid(x W^T); experts = the A highest of s + bias, of the best groups only where there are groups, or
    `tid2eid[token]`; weights = s / sum s * scaling.

    Attributes:
        weight: [E, D].
        bias: [E] fp32 buffer of a scored layer, moved by `update_bias`, part of the choice only.
        tid2eid: [V, A] int64 buffer of a hash layer.
        load: [E] fp32, tokens that each expert got in training since the last update; not saved.

    Source: v4_spec 4; for V3.2 section 2.8.
    """

    bias: Tensor | None
    tid2eid: Tensor | None
    load: Tensor

    def __init__(self, config: AnyConfig, layer: int) -> None:
        super().__init__()
        experts, self.active = config.n_routed_experts, config.num_experts_per_tok
        self.weight = nn.Parameter(torch.empty(experts, config.hidden_size))
        self.scaling, self.normalises = config.routed_scaling_factor, config.norm_topk_prob
        self.groups, self.kept_groups = config.n_group, config.topk_group
        self.score = _SCORES[config.scoring_func]
        self.rule = Rule(config.scoring_func, self.active, self.normalises, self.scaling)
        hashed = layer < config.num_hash_layers
        self.register_buffer("bias", None if hashed else torch.zeros(experts))
        self.register_buffer("tid2eid", _hash_table(config, layer) if hashed else None)
        self.register_buffer("load", torch.zeros(experts), persistent=False)

    def forward(self, x: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Route [T, D] tokens: experts [T, A] int64, weights [T, A] fp32, scores [T, E] fp32."""
        if implementation_for(x) == "triton":
            return self._routed(x, tokens)
        scores = self.score(x.float() @ self.weight.float().T)
        if self.tid2eid is not None:
            indices = self.tid2eid[tokens]
        else:
            assert self.bias is not None
            indices = torch.topk(self._within_groups(scores + self.bias), self.active, dim=-1, sorted=False).indices
        weights = scores.gather(1, indices)
        if self.normalises:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        if self.training and torch.is_grad_enabled():
            self.load += torch.bincount(indices.flatten(), minlength=len(self.load))
        return indices, weights * self.scaling, scores

    def _routed(self, x: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Do the same with Triton."""
        from model.kernels.router import fused  # brings Triton, which a CPU does without

        indices = None if self.tid2eid is None else self.tid2eid[tokens]
        if self.bias is not None and self.kept_groups != self.groups:
            with torch.no_grad():
                scores = fused.route(x, self.weight, self.rule, bias=self.bias).scores
                indices = torch.topk(self._within_groups(scores + self.bias), self.active, dim=-1, sorted=False).indices
        routing = fused.route(x, self.weight, self.rule, bias=self.bias, indices=indices)
        if self.training and torch.is_grad_enabled():
            self.load += routing.counts.sum(0)
        return routing.indices, routing.weights, routing.scores

    def _within_groups(self, scores: Tensor) -> Tensor:
        """Put -inf outside the `kept_groups` groups whose two best experts have the highest sum; [T, E] to [T, E]."""
        if self.kept_groups == self.groups:
            return scores
        grouped = scores.unflatten(1, (self.groups, -1))
        best = grouped.topk(min(2, grouped.shape[2]), dim=-1).values.sum(-1)
        kept = best.topk(self.kept_groups, dim=-1, sorted=False).indices
        dropped = torch.ones_like(best, dtype=torch.bool).scatter_(1, kept, False)
        return grouped.masked_fill(dropped.unsqueeze(2), float("-inf")).flatten(1)

    def balance_loss(self, indices: Tensor, scores: Tensor, row: PackedRow) -> Tensor:
        """Compute the sequence-wise balance loss, averaged over the row's samples by their tokens.

        A sample of n tokens has sum_e f_e P_e, f_e = E / (A n) * #{t: e chosen}, P_e = mean_t s_te / sum_e s_te; zero in a hash layer.

        Returns:
            [] fp32, about 1 when balanced.

        Source: DeepSeek-V3 report eq. 17-20.
        """
        if self.tid2eid is not None:
            return scores.new_zeros(())
        if implementation_for(scores) == "triton":
            from model.kernels.router import fused  # brings Triton, which a CPU does without

            return fused.balance_loss(scores, indices, row.cu_seqlens, row.sample)
        shares = scores / scores.sum(-1, keepdim=True)
        count, experts = len(row.lengths), scores.shape[1]
        chosen = torch.bincount((row.sample.unsqueeze(1) * experts + indices).flatten(), minlength=count * experts).view(count, experts)
        total = scores.new_zeros(count, experts).index_add(0, row.sample, shares)
        per_sample = (chosen * total).sum(-1) * (experts / self.active) / row.lengths  # n * sum_e f_e P_e
        return per_sample.sum() / row.length

    def update_bias(self, speed: float, load: Tensor) -> None:
        """Lower the bias of overloaded experts and raise that of underloaded ones by `speed`; source: DeepSeek-V3 report 2.1.2."""
        if self.bias is not None:
            self.bias += speed * torch.sign(load.mean() - load)


class Experts(nn.Module):
    """The routed experts' matrices, stacked: w1 (gate), w3 (up) [E, F, D], w2 (down) [E, D, F].

    Attributes:
        fp4: whether they are rounded to MXFP4 on the way into the products, see `Transformer.quantize`.
    """

    def __init__(self, config: AnyConfig) -> None:
        super().__init__()
        experts, width, inner = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.w1 = nn.Parameter(torch.empty(experts, inner, width))
        self.w2 = nn.Parameter(torch.empty(experts, width, inner))
        self.w3 = nn.Parameter(torch.empty(experts, inner, width))
        self.limit = config.swiglu_limit
        self.fp4 = False

    def matrices(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return w1, w2, w3 as the products take them: on MXFP4's grid, with the gradient going straight to the masters, if `fp4`."""
        if not self.fp4:
            return self.w1, self.w2, self.w3
        return fake_quantize_mxfp4(self.w1), fake_quantize_mxfp4(self.w2), fake_quantize_mxfp4(self.w3)

    def forward(self, x: Tensor, indices: Tensor, weights: Tensor, *, beside: Tensor | None = None) -> Tensor:
        """Sum the chosen experts of [T, D] tokens, and `beside` [T, D]."""
        return routed_experts(x, indices, weights, self.matrices(), limit=self.limit, beside=beside)


class MLP(nn.Module):
    """The feed-forward network that every token passes, dense layer or shared expert: w2(silu(min(w1 x, l)) * clamp(w3 x, -l, l))."""

    def __init__(self, width: int, inner: int, limit: float) -> None:
        super().__init__()
        self.w1 = linear(width, inner)
        self.w2 = linear(inner, width)
        self.w3 = linear(width, inner)
        self.limit = limit

    def forward(self, x: Tensor) -> Tensor:
        """Map [T, D] to [T, D]."""
        if implementation_for(x) == "triton":
            from model.kernels.experts import gated  # brings Triton, which a CPU does without

            return self.w2(gated.swiglu(stacked_linear(x, self.w1, self.w3), self.limit))
        return self.w2(swiglu(self.w1(x), self.w3(x), self.limit))


class MoE(nn.Module):
    """The feed-forward sub-layer: shared expert plus routed experts."""

    def __init__(self, config: AnyConfig, layer: int) -> None:
        super().__init__()
        self.gate = Gate(config, layer)
        self.experts = Experts(config)
        shared = config.n_shared_experts * config.moe_intermediate_size
        self.shared_experts = MLP(config.hidden_size, shared, config.swiglu_limit)

    def forward(self, x: Tensor, tokens: Tensor, row: PackedRow | None) -> tuple[Tensor, Tensor | None]:
        """Map [T, D] tokens; the balance loss is computed where a packed row is given (not in a rollout)."""
        indices, weights, scores = self.gate(x, tokens)
        if implementation_for(x) == "triton":
            out = self.experts(x, indices, weights, beside=self.shared_experts(x))
        else:
            out = self.experts(x, indices, weights) + self.shared_experts(x)
        return out, None if row is None else self.gate.balance_loss(indices, scores, row)


def _sqrt_softplus(logits: Tensor) -> Tensor:
    return functional.softplus(logits).sqrt()


_SCORES: dict[str, Callable[[Tensor], Tensor]] = {"sqrtsoftplus": _sqrt_softplus, "sigmoid": torch.sigmoid}
"""How a router's logits become scores, by `scoring_func`."""


def _hash_table(config: AnyConfig, layer: int) -> Tensor:
    """Draw distinct experts for every token id, [V, A] int64; the same for every model of this shape."""
    generator = torch.Generator().manual_seed(_HASH_SEED + layer)
    draws = torch.rand(config.vocab_size, config.n_routed_experts, generator=generator, device="cpu")
    return draws.topk(config.num_experts_per_tok, dim=-1).indices
