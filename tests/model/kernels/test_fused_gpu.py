"""The fused element-wise operations at real sizes on a GPU: errors of at most 1.5 times those of plain torch in bf16."""

import pytest
import torch

from model.config import ModelConfig
from model.hyper_connections import copies
from model.kernels.choice import choose
from model.kernels.experts import reference as experts_reference
from model.kernels.experts.op import routed_experts
from model.layout import PackedRow
from model.linear import GroupedLinear
from model.moe import MLP, Gate
from model.norm import RMSNorm, unit_norm
from model.rope import rotate

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
SLACK, FLOOR = 1.5, 1e-4
"""Of the eager error, and a twentieth of a bf16 rounding for what it happens to hit exactly."""


def half(*shape, scale=1.0):
    return (torch.randn(*shape, device="cuda") * scale).bfloat16()


def error(got, want):
    return float((got.detach().double() - want.detach().double()).norm() / want.detach().double().norm())


def check(run, leaves, grad):
    """Compare `run` of kernels in bf16 with plain torch in bf16, both against plain torch in fp32."""
    results = []
    for implementation, dtype in (("triton", torch.bfloat16), ("reference", torch.bfloat16), ("reference", torch.float32)):
        choose(implementation)
        given = [leaf.detach().to(dtype).requires_grad_() for leaf in leaves]
        out = run(*given)
        results.append([out, *torch.autograd.grad(out, given, grad.to(out.dtype))])
    for number, (got, eager, want) in enumerate(zip(*results, strict=True)):
        assert error(got, want) <= SLACK * error(eager, want) + FLOOR, number


def functional(module, run):
    """Let `run` take the module's parameters as arguments after its input."""
    names = [name for name, _ in module.named_parameters()]

    def call(x, *parameters):
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), run(x))

    return call, [parameter.detach().clone() for parameter in module.parameters()]


def turns_of(tokens, pairs):
    angles = torch.rand(tokens, pairs, device="cuda") * 100
    return torch.polar(torch.ones_like(angles), angles)


@pytest.mark.parametrize(("tokens", "heads", "width", "pairs"), [(3001, 64, 512, 32), (4099, 16, 128, 16), (1, 3, 48, 24)], ids=str)
def test_queries_and_outputs(tokens, heads, width, pairs):
    turns = turns_of(tokens, pairs).unsqueeze(1)
    x, grad = half(tokens, heads, width), half(tokens, heads, width)
    check(lambda x: unit_norm(x, 1e-6, turns), [x], grad)
    check(lambda x: rotate(x, turns, inverse=True), [x], grad)


@pytest.mark.parametrize(("tokens", "width"), [(8192, 4096), (1, 7168), (32177, 2048), (777, 1536)], ids=str)
def test_norm_with_weight(tokens, width):
    norm = RMSNorm(width, 1e-6).cuda()
    call, parameters = functional(norm, lambda x: (x,))
    check(call, [half(tokens, width), *parameters], half(tokens, width))


def test_keys():
    turns, norm = turns_of(8191, 32), RMSNorm(512, 1e-6).cuda()
    call, parameters = functional(norm, lambda x: (x[:, 128:], turns))
    check(call, [half(8191, 640), *parameters], half(8191, 512))


@pytest.mark.parametrize("shared", [False, True], ids=["apart", "shared"])
@pytest.mark.parametrize("ratio", [4, 128])
@pytest.mark.parametrize("lengths", [[2049], [130, 900, 5, 201]], ids=str)
def test_compressor(lengths, ratio, shared):
    from model.kernels.pooling import fused, reference

    config = ModelConfig(num_hidden_layers=2, compress_ratios=[4, 128], num_nextn_predict_layers=0)
    tokens = sum(lengths)
    source = None
    if shared:
        source = torch.arange(tokens, device="cuda") // 2
    row = PackedRow(config, torch.tensor([0, *lengths], device="cuda").cumsum(0), tokens, source)
    entries, overlaps = row.entries[ratio], ratio == 4
    channels = 1024 if overlaps else 512
    inputs = [half(tokens // 2 + tokens % 2 if shared else tokens, channels) for _ in range(2)] + [half(ratio, channels)]
    grad = torch.randn(len(entries.first), 512, device="cuda")
    results = []
    for run, dtype in (
        (lambda *a: fused.pool(*a, entries, overlaps=overlaps, shared=shared), torch.bfloat16),
        (lambda *a: reference.pool(*a, entries, overlaps=overlaps), torch.float64),
    ):
        leaves = [leaf.detach().to(dtype).requires_grad_() for leaf in inputs]
        out = run(*leaves)
        results.append((out, *torch.autograd.grad(out, leaves, grad)))
    for number, (got, want) in enumerate(zip(*results, strict=True)):
        assert error(got, want) < (1e-5 if number == 0 else 4e-3), number


@pytest.mark.parametrize(("width", "inner"), [(2048, 640), (1024, 1000)], ids=str)
def test_shared_expert(width, inner):
    mlp = MLP(width, inner, 3.0).cuda()
    call, parameters = functional(mlp, lambda x: (x,))
    check(call, [half(3001, width), *(half(*p.shape, scale=width**-0.5) for p in parameters)], half(3001, width))


def test_routed_experts_as_one_product():
    """More rows than the matrices of both branches have, so that these are put together, and a shared expert's output beside them."""
    indices = torch.rand(3001, 7, device="cuda").topk(3).indices  # the last expert gets nothing
    inputs = [
        half(3001, 256),
        half(3001, 3).abs(),
        half(3001, 256),
        *(half(8, *shape, scale=0.1) for shape in ((384, 256), (256, 384), (384, 256))),
    ]
    grad, results = half(3001, 256), []

    def dense(x, indices, weights, matrices, *, limit, beside):
        return experts_reference.routed_experts(x, indices, weights, matrices, limit=limit) + beside

    for implementation, run, dtype in (
        ("triton", routed_experts, torch.bfloat16),
        ("reference", routed_experts, torch.bfloat16),
        ("reference", dense, torch.float32),
    ):
        choose(implementation)
        x, weights, beside, *matrices = leaves = [leaf.detach().clone().to(dtype).requires_grad_() for leaf in inputs]
        out = run(x, indices, weights.float(), tuple(matrices), limit=2.0, beside=beside)
        results.append((out, *torch.autograd.grad(out, leaves, grad.to(dtype))))
    for number, (got, eager, want) in enumerate(zip(*results, strict=True)):
        assert error(got, want) <= SLACK * error(eager, want) + FLOOR, number


def test_grouped_linear():
    grouped = GroupedLinear(512, 256, 4).cuda()
    call, parameters = functional(grouped, lambda x: (x,))
    check(call, [half(3001, 2048), *(half(*p.shape, scale=0.05) for p in parameters)], half(3001, 1024))


def test_copies():
    check(lambda x: copies(x, 4), [half(3001, 4096)], half(3001, 4, 4096))


@pytest.mark.parametrize(("experts", "dtype"), [(256, torch.float32), (16, torch.bfloat16)], ids=str)
def test_router(experts, dtype):
    config = ModelConfig(num_hidden_layers=1, compress_ratios=[0], n_routed_experts=experts, num_hash_layers=0, num_nextn_predict_layers=0)
    gate = Gate(config, 0).cuda()
    x, weight = half(8191, 4096), (torch.randn(experts, 4096, device="cuda") * 0.02).to(dtype)
    row = PackedRow(config, torch.tensor([0, 4000, 4003, 8191], device="cuda"), 8191)
    grad = torch.randn(8191, config.num_experts_per_tok, device="cuda")
    results = []
    for implementation in ("triton", "reference"):
        choose(implementation)
        gate.load.zero_()
        leaves = [x.detach().requires_grad_(), weight.detach().requires_grad_()]
        indices, weights, scores = torch.func.functional_call(gate, {"weight": leaves[1]}, (leaves[0], torch.zeros(8191, device="cuda")))
        order = indices.argsort(1)
        weights, loss = weights.gather(1, order), gate.balance_loss(indices, scores, row)
        grads = torch.autograd.grad((weights * grad).sum() + loss * 100, leaves)
        results.append((indices.gather(1, order), weights, scores, loss, gate.load.clone(), *grads))
    alike = (results[0][0] == results[1][0]).all(1)
    assert alike.float().mean() > 0.999  # sums of products in another order may swap two experts that tie
    assert error(results[0][1][alike], results[1][1][alike]) < 1e-4
    limits = (1e-5, 1e-4, 1e-2, 4e-3 if experts == 16 else 2e-2, 2e-2)
    for number, (limit, got, want) in enumerate(zip(limits, results[0][2:], results[1][2:], strict=True)):
        assert error(got, want) < limit, number
