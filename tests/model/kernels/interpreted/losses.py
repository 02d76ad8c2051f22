"""Reverse KL and token log-probabilities: the chunked Triton paths against dense forms, in value and gradient."""

import pytest
import torch
import torch.nn.functional as F

from model.kernels.choice import choose
from model.kernels.logprob.chunked import gradients, statistics
from model.kernels.logprob.op import token_logprobs
from model.kernels.reverse_kl.chunked import rows_kl
from model.kernels.reverse_kl.op import reverse_kl


@pytest.fixture(autouse=True)
def triton_everywhere():
    choose("triton")


def problem(rows, width, vocabulary, dtype=torch.float32):
    torch.manual_seed(rows * 1000 + vocabulary)
    hidden = torch.randn(rows, width).to(dtype).requires_grad_()
    return hidden, torch.randn(vocabulary, width).to(dtype).requires_grad_()


@pytest.mark.parametrize(("rows", "vocabulary", "chunk"), [(1, 5, 4), (7, 130, 3), (9, 4099, 64), (0, 6, 2)], ids=str)
def test_reverse_kl(rows, vocabulary, chunk):
    student, head = problem(rows, 8, vocabulary)
    teacher = (3 * torch.randn(rows, 6), torch.randn(vocabulary, 6))
    weights = torch.rand(rows)
    total, per_row = reverse_kl(student, head, teacher, weights, chunk=chunk)
    log_p, log_q = (F.log_softmax((h.double() @ w.double().T), -1) for h, w in ((student, head), teacher))
    dense = (log_p.exp() * (log_p - log_q)).sum(-1)
    torch.testing.assert_close(per_row.double(), dense, rtol=1e-4, atol=1e-5)
    got = torch.autograd.grad(total * 2.5, (student, head))
    want = torch.autograd.grad((dense * weights).sum() * 2.5, (student, head))
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=2e-5)


def test_reverse_kl_without_gradients_leaves_the_logits():
    z, y, kl = torch.randn(3, 50), torch.randn(3, 50), torch.full((3,), float("nan"))
    before = z.clone()
    rows_kl(z, y, torch.ones(3), kl, write=False)
    assert torch.equal(z, before)
    assert kl.isfinite().all()


def test_reverse_kl_of_peaked_and_shifted_logits():
    z = torch.tensor([[300.0, -300.0, 0.0], [1e4, 1e4, -1e4], [0.0, 0.0, 0.0]])
    y = torch.tensor([[299.0, -100.0, 0.0], [0.0, 0.0, 0.0], [88.0, 88.0, 88.0]])
    kl = torch.empty(3)
    rows_kl(z.clone(), y, torch.ones(3), kl, write=True)
    torch.testing.assert_close(kl, torch.tensor([0.0, 0.4054651, 0.0]), rtol=1e-4, atol=2e-3)


@pytest.mark.parametrize(("rows", "vocabulary", "chunk"), [(1, 5, 4), (7, 130, 3), (9, 4099, 64), (0, 6, 2)], ids=str)
def test_token_logprobs(rows, vocabulary, chunk):
    hidden, head = problem(rows, 8, vocabulary)
    targets, upstream = torch.randint(0, vocabulary, (rows,)), torch.randn(rows)
    logprobs, entropy = token_logprobs(hidden, head, targets, chunk=chunk)
    dense = F.log_softmax(hidden.double() @ head.double().T, -1)
    chosen = dense.gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(logprobs.double(), chosen, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy.double(), -(dense.exp() * dense).sum(-1), rtol=1e-4, atol=1e-5)
    got = torch.autograd.grad((logprobs * upstream).sum(), (hidden, head))
    want = torch.autograd.grad((chosen * upstream).sum(), (hidden, head))
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_a_second_backward_gives_the_same():
    hidden, head = problem(5, 8, 40)
    logprobs, _ = token_logprobs(hidden, head, torch.arange(5))
    first = torch.autograd.grad(logprobs.sum(), (hidden, head), retain_graph=True)
    second = torch.autograd.grad(logprobs.sum(), (hidden, head))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_every_number_is_written_in_the_dtype_of_the_logits(dtype):
    logits = torch.randn(4, 77).to(dtype)
    targets, grad, out = torch.tensor([0, 76, 3, 3]), torch.randn(4), torch.full((4, 77), float("nan"), dtype=dtype)
    found = torch.full((3, 4), float("nan"))
    statistics(logits, targets, found)
    gradients(logits, targets, found[2], grad, out=out)
    p = logits.float().softmax(-1)
    want = grad[:, None] * (F.one_hot(targets, 77) - p)
    torch.testing.assert_close(out.float(), want, rtol=2**-7 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)
