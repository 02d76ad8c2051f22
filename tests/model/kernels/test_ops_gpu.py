"""The Triton operations at real sizes on a GPU: errors of at most 1.5 times those of plain torch in bf16, offsets beyond 2^31."""

from contextlib import contextmanager

import pytest
import torch

from model.config import ModelConfig
from model.kernels.choice import choose
from model.kernels.experts import op as experts_op
from model.kernels.experts import reference as experts_reference
from model.kernels.hyper_connections import op as hyper_op
from model.kernels.hyper_connections import reference as hyper_reference
from model.kernels.indexer.op import select
from model.kernels.logprob.op import token_logprobs
from model.kernels.logprob.reference import token_logprobs as plain_token_logprobs
from model.kernels.newton_schulz import reference as newton_schulz_reference
from model.kernels.newton_schulz.op import orthogonalize, orthogonalize_
from model.kernels.reverse_kl.op import reverse_kl
from model.kernels.reverse_kl.reference import reverse_kl as plain_reverse_kl
from model.kernels.updates import op as updates
from model.kernels.updates import reference as updates_reference
from model.kernels.updates.reference import AdamStep
from model.layout import PackedRow
from model.quant.fp8 import encode_fp8
from model.quant.grid import E2M1, E4M3, onto_grid
from model.quant.mxfp4 import quantize_mxfp4

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
SLACK, FLOOR = 1.5, 1e-4
"""Of the eager error, and a twentieth of a bf16 rounding for what it happens to hit exactly."""


@contextmanager
def plain_torch():
    """Compute everything inside with the references."""
    choose("reference")
    try:
        yield
    finally:
        choose(None)


def half(*shape, scale=1.0):
    return (torch.randn(*shape, device="cuda") * scale).bfloat16().requires_grad_()


def error(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm())


def check(got, eager, want):
    """Compare lists of tensors: each of `got` may be 1.5 times as far from `want` as that of `eager` is."""
    for number, (mine, theirs, right) in enumerate(zip(got, eager, want, strict=True)):
        assert error(mine, right) <= SLACK * error(theirs, right) + FLOOR, number


@pytest.mark.parametrize("rows", [1, 301])
def test_reverse_kl(rows):
    student, head, hidden, other = half(rows, 512), half(129280, 512, scale=0.1), half(rows, 256), half(129280, 256, scale=0.1)
    weights = torch.rand(rows, device="cuda")

    def run(kernel, dtype, chunk):
        a, h, b, o = (t.detach().to(dtype) for t in (student, head, hidden, other))
        a.requires_grad_(), h.requires_grad_()
        total, each = kernel(a, h, (b, o), weights, chunk=chunk)
        return total, each, *torch.autograd.grad(total, (a, h))

    check(run(reverse_kl, torch.bfloat16, 128), run(plain_reverse_kl, torch.bfloat16, 512), run(plain_reverse_kl, torch.float32, 512))


@pytest.mark.parametrize("chunk", [128, 512])
def test_token_logprobs(chunk):
    hidden, head, targets = half(301, 512), half(129280, 512, scale=0.1), torch.randint(0, 129280, (301,), device="cuda")
    grad = torch.randn(301, device="cuda")

    def run(kernel, dtype):
        h, w = hidden.detach().to(dtype).requires_grad_(), head.detach().to(dtype).requires_grad_()
        logprobs, entropy = kernel(h, w, targets, chunk=chunk)
        return logprobs, entropy, *torch.autograd.grad(logprobs, (h, w), grad)

    check(run(token_logprobs, torch.bfloat16), run(plain_token_logprobs, torch.bfloat16), run(plain_token_logprobs, torch.float32))


@pytest.mark.parametrize(("tokens", "draws"), [(1, 16), (517, 1)])
def test_hyper_connections(tokens, draws):
    """One token is drawn several times: the gradient of `scale` sums four terms that may cancel, and says nothing of one draw."""
    config = ModelConfig(num_hidden_layers=1, compress_ratios=[0], num_nextn_predict_layers=0)

    def run(kernels, dtype, inputs, grad):
        f, x, fn, base, scale = (t.detach().to(torch.promote_types(t.dtype, dtype)).requires_grad_() for t in inputs)
        with torch.device("cuda"):
            collapsed, post, comb = kernels.mix_in(x, fn, base, scale, config=config)
        out = kernels.mix_out((collapsed * f).to(x.dtype), x, post, comb)
        return collapsed, post, comb, out, *torch.autograd.grad(out, (f, x, fn, base, scale), grad.to(out.dtype))

    class Eager:
        """The definition with its streams in bf16 between two operations."""

        @staticmethod
        def mix_in(x, *parameters, config):
            collapsed, post, comb = hyper_reference.mix_in(x.float(), *parameters, config=config)
            return collapsed.to(x.dtype), post, comb

        @staticmethod
        def mix_out(f, x, post, comb):
            return hyper_reference.mix_out(f.float(), x.float(), post, comb).to(x.dtype)

    runs = []
    for _ in range(draws):
        parameters = [torch.randn(24, 4 * 4096, device="cuda") * 0.02, torch.randn(24, device="cuda"), torch.randn(3, device="cuda")]
        inputs = [half(tokens, 4096), half(tokens, 4, 4096), *parameters]
        grad = torch.randn(tokens, 4, 4096, device="cuda").bfloat16()
        ways = ((hyper_op, torch.bfloat16), (Eager, torch.bfloat16), (hyper_reference, torch.float64))
        runs.append([run(*way, inputs, grad) for way in ways])
    check(*([torch.stack(results) for results in zip(*way, strict=True)] for way in zip(*runs, strict=True)))


@pytest.mark.parametrize("shape", [(3, 2048, 2048), (2, 1000, 4040), (700, 300)], ids=str)
def test_newton_schulz(shape):
    matrices = torch.randn(shape, device="cuda").bfloat16()
    want = newton_schulz_reference.orthogonalize(matrices.double())
    check([orthogonalize(matrices)], [newton_schulz_reference.orthogonalize(matrices)], [want])


def test_newton_schulz_in_place():
    shapes = [(640, 2048), (2048, 640), (3, 2048, 640), (24, 8192), (4, 256), (2048, 2048), (300, 77)]
    flat = torch.randn(sum(torch.Size(shape).numel() for shape in shapes) + 8, device="cuda")
    pieces = flat[8:].split([torch.Size(shape).numel() for shape in shapes])
    matrices = [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]
    gap = flat[:8].clone()
    wanted = [0.3 * max(each.shape[-2:]) ** 0.5 * newton_schulz_reference.orthogonalize(each.double()) for each in matrices]
    eager = [matrix.bfloat16() for matrix in matrices]
    newton_schulz_reference.orthogonalize_(eager, 0.3)
    orthogonalize_(matrices, 0.3)
    check(matrices, eager, wanted)
    for matrix, want in zip(matrices, wanted, strict=True):
        if matrix.shape[-2] != matrix.shape[-1]:  # a square one's smallest singular values lie near 0, which the iteration magnifies
            assert error(matrix, want) < 5e-3
    assert torch.equal(flat[:8], gap)


@pytest.mark.parametrize("count", [1 << 20, (1 << 20) + 5], ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e-19], ids=str)
def test_updates(count, scale):
    way = AdamStep((0.9, 0.95), 1e-20, 0.01, 0.999)
    parameter, gradient, mean = (torch.randn(count, device="cuda") for _ in range(3))
    start = [parameter, gradient * scale, mean * scale, (mean * scale).square()]
    got, want = ([each.clone() for each in start] for _ in range(2))
    for module, (weight, new, first, second) in ((updates, got), (updates_reference, want)):
        module.adamw_(weight, new, (first, second), way)
        module.nesterov_(new, first, 0.95)
        module.descend_(weight, new, 0.01, 0.9)
    for mine, right, before in zip(got, want, start, strict=True):
        torch.testing.assert_close(mine, right, rtol=2e-6, atol=2e-6 * float(before.abs().max()))


@pytest.mark.parametrize("lengths", [[1], [2900, 17, 3, 2777, 1], [9000]], ids=str)
def test_indexer(lengths):
    config = ModelConfig(num_hidden_layers=1, compress_ratios=[4], num_nextn_predict_layers=0)
    tokens = sum(lengths)
    row = PackedRow(config, torch.tensor([0, *lengths], device="cuda").cumsum(0), tokens)
    entries = row.entries[4]
    q, keys = half(tokens, 64, 128).detach(), half(len(entries.first), 128).detach()
    weights = torch.randn(tokens, 64, device="cuda") / 64
    got = select(q, keys, weights, row=row, ratio=4, count=512)
    for token in sorted({0, tokens // 3, tokens // 2, tokens - 1}):
        low, seen = int(entries.base[token]), int(entries.visible[token])
        scores = weights[token].double() @ (q[token].double() @ keys[low : low + seen].double().T).relu()
        chosen = got[token][got[token] >= 0]
        assert len(chosen.unique()) == len(chosen) == min(512, seen, got.shape[1])
        if len(chosen) < seen:
            assert scores[chosen].min() >= scores.topk(len(chosen)).values[-1] - 1e-4 * scores.abs().max()


def test_experts():
    x, indices = half(700, 256), torch.rand(700, 15, device="cuda").topk(3).indices  # the last expert gets nothing
    weights = torch.rand(700, 3, device="cuda", requires_grad=True)
    matrices = [half(16, 384, 256, scale=0.1), half(16, 256, 384, scale=0.1), half(16, 384, 256, scale=0.1)]
    grad = torch.randn(700, 256, device="cuda").bfloat16()

    def run(kernel, dtype):
        leaves = [t.detach().to(torch.promote_types(t.dtype, dtype)).requires_grad_() for t in (x, weights, *matrices)]
        out = kernel(leaves[0], indices, leaves[1], tuple(leaves[2:]), limit=2.0)
        return out, *torch.autograd.grad(out, leaves, grad.to(out.dtype))

    def fused(x, indices, weights, matrices, *, limit):
        from model.kernels.experts.fused import RoutedExperts  # brings Triton

        return RoutedExperts.apply(x, indices, weights, *matrices, limit)

    def plain(x, indices, weights, matrices, *, limit):
        return experts_op._Experts.apply(x, indices, weights, *matrices, limit)

    check(run(fused, torch.bfloat16), run(plain, torch.bfloat16), run(experts_reference.routed_experts, torch.float32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(1, 128), (513, 7168), (3, 5, 200)], ids=str)
def test_quantisation_gives_the_same_bytes(shape, dtype):
    from model.kernels.quant import op as quant  # brings Triton

    x = (torch.randn(shape, device="cuda") * torch.exp2(torch.randint(-20, 20, (*shape[:-1], 1), device="cuda").float())).to(dtype)
    x.view(-1)[:6] = torch.tensor([1e-38, -0.0, 448, 6, -1e-30, 2**-9], device="cuda")
    matrix = x.flatten(0, -2)
    with plain_torch():
        wanted = [encode_fp8(x, (1, 128)), quantize_mxfp4(x), (onto_grid(x, E4M3, block=(1, 128)),), (onto_grid(x, E2M1, block=(1, 32)),)]
        wanted.append((onto_grid(matrix, E2M1, block=(1, 32)), onto_grid(matrix.T.contiguous(), E2M1, block=(1, 32)).T.contiguous()))
    found = [quant.quantize_fp8(x, group=128), quant.quantize_mxfp4(x), (onto_grid(x, E4M3, block=(1, 128)),)]
    found += [(onto_grid(x, E2M1, block=(1, 32)),), quant.fake_quantize_both(matrix, group=32, grid=E2M1)]
    for got, want in zip(found, wanted, strict=True):
        assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(got, want, strict=True))


def test_offsets_beyond_int32():
    from model.kernels.logprob.chunked import gradients, statistics  # brings Triton
    from model.kernels.quant import op as quant

    rows, vocabulary = 16700, 129280
    logits = torch.zeros(rows, vocabulary, dtype=torch.bfloat16, device="cuda")
    logits[-3:] = torch.randn(3, vocabulary, device="cuda")
    targets, found = torch.arange(rows, device="cuda"), torch.empty(3, rows, device="cuda")
    statistics(logits, targets, found)
    want = logits[-3:].float().log_softmax(-1)
    torch.testing.assert_close(found[0, -3:], want.gather(1, targets[-3:, None])[:, 0], rtol=1e-4, atol=1e-4)
    rounded = quant.fake_quantize(logits, group=32, grid=E2M1)
    with plain_torch():
        assert torch.equal(rounded[-3:], onto_grid(logits[-3:], E2M1, block=(1, 32)))
    gradients(logits, targets, found[2], torch.ones(rows, device="cuda"), out=logits)
    want = -want.exp().scatter_add_(1, targets[-3:, None], -torch.ones(3, 1, device="cuda"))
    assert error(logits[-3:], want) < 1e-2
