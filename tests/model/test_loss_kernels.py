"""The chunked loss kernels equal their dense forms, in value and gradient."""

import pytest
import torch
import torch.nn.functional as F

from model.kernels.logprob.reference import token_logprobs
from model.kernels.reverse_kl import op
from model.kernels.reverse_kl.reference import reverse_kl


def random_problem(rows: int, width: int, vocabulary: int):
    generator = torch.Generator().manual_seed(rows * 1000 + vocabulary)
    hidden = torch.randn(rows, width, generator=generator, dtype=torch.float64, requires_grad=True)
    head = torch.randn(vocabulary, width, generator=generator, dtype=torch.float64, requires_grad=True)
    return hidden, head, generator


@pytest.mark.parametrize("chunk", [1, 3, 7, 64], ids=lambda c: f"chunk{c}")
@pytest.mark.parametrize("rows", [1, 7, 13], ids=lambda r: f"rows{r}")
def test_token_logprobs_equal_dense_log_softmax(rows, chunk):
    hidden, head, generator = random_problem(rows, 5, 11)
    targets = torch.randint(0, 11, (rows,), generator=generator)
    upstream = torch.randn(rows, generator=generator)
    logprobs, entropy = token_logprobs(hidden, head, targets, chunk=chunk)
    dense = F.log_softmax((hidden @ head.T).float(), -1)
    torch.testing.assert_close(logprobs, dense.gather(1, targets[:, None])[:, 0])
    torch.testing.assert_close(entropy, -(dense.exp() * dense).sum(-1))
    got = torch.autograd.grad((logprobs * upstream).sum(), (hidden, head))
    want = torch.autograd.grad((dense.gather(1, targets[:, None])[:, 0] * upstream).sum(), (hidden, head))
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunk", [1, 4, 64], ids=lambda c: f"chunk{c}")
def test_reverse_kl_equals_dense_form(chunk):
    student, head, generator = random_problem(9, 5, 17)
    teacher = (torch.randn(9, 6, generator=generator, dtype=torch.float64), torch.randn(17, 6, generator=generator, dtype=torch.float64))
    weights = torch.rand(9, generator=generator)
    total, per_row = reverse_kl(student, head, teacher, weights, chunk=chunk)
    log_p = F.log_softmax((student @ head.T).float(), -1)
    log_q = F.log_softmax((teacher[0] @ teacher[1].T).float(), -1)
    dense = (log_p.exp() * (log_p - log_q)).sum(-1)
    torch.testing.assert_close(per_row, dense)
    torch.testing.assert_close(total, (dense * weights).sum())
    got = torch.autograd.grad(total * 2.5, (student, head))
    want = torch.autograd.grad((dense * weights).sum() * 2.5, (student, head))
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_reverse_kl_of_a_student_against_itself_is_zero_and_pulls_nowhere():
    student, head, _ = random_problem(6, 4, 9)
    total, per_row = reverse_kl(student, head, (student.detach(), head.detach()), torch.ones(6))
    assert per_row.abs().max() < 1e-6
    grads = torch.autograd.grad(total, (student, head))
    assert max(g.abs().max() for g in grads) < 1e-6


def test_reverse_kl_refuses_two_vocabularies():
    with pytest.raises(ValueError, match="9 entries, the teacher's 8"):
        op.reverse_kl(torch.zeros(2, 3), torch.zeros(9, 3), (torch.zeros(2, 3), torch.zeros(8, 3)), torch.ones(2))
