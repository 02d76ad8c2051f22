"""Distillation: the loss is the dense reverse KL, teachers of another vocabulary are refused, domains get their share."""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F

from distill.config import DistillConfig
from distill.loop import prompts_of_step
from distill.loss import reverse_kl
from distill.teachers import refuse_foreign_teachers
from domains.types import Prompt
from model.tokenizer import Tokenizer
from runtime.objective import Rows


def rows(teacher):
    hidden = torch.randn(7, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    return Rows(hidden, torch.zeros(7, dtype=torch.int64), {}, torch.zeros(7, dtype=torch.int64), 1, teacher)


def test_loss_sums_the_dense_reverse_kl():
    generator = torch.Generator().manual_seed(1)
    head = torch.randn(9, 4, generator=generator, requires_grad=True)
    teacher = (torch.randn(7, 6, generator=generator), torch.randn(9, 6, generator=generator))
    batch = rows(teacher)
    total, metrics = reverse_kl(batch, head, chunk=3)
    log_p, log_q = F.log_softmax(batch.hidden @ head.T, -1), F.log_softmax(teacher[0] @ teacher[1].T, -1)
    dense = (log_p.exp() * (log_p - log_q)).sum()
    torch.testing.assert_close(total, dense)
    torch.testing.assert_close(metrics["distill/reverse_kl"], dense)
    for mine, theirs in zip(
        torch.autograd.grad(total, (batch.hidden, head)), torch.autograd.grad(dense, (batch.hidden, head)), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_a_student_that_equals_its_teacher_has_nothing_to_learn():
    head = torch.randn(9, 4, generator=torch.Generator().manual_seed(1), requires_grad=True)
    plain = rows(None)
    total, _ = reverse_kl(plain._replace(teacher=(plain.hidden.detach(), head.detach())), head, chunk=3)
    assert total.abs() < 1e-5
    assert all(g.abs().max() < 1e-5 for g in torch.autograd.grad(total, (plain.hidden, head)))


@pytest.fixture
def models(tmp_path):
    def make(name, texts, vocab=None):
        tokenizer = Tokenizer.train(texts, 300)
        (tmp_path / name).mkdir()
        tokenizer.save(tmp_path / name)
        (tmp_path / name / "config.json").write_text(json.dumps({"vocab_size": vocab or tokenizer.vocab_size}))
        return tmp_path / name

    return make


def test_teachers_that_spell_or_predict_differently_are_refused_all_at_once(models, tmp_path):
    student = models("student", ["abcabcabc"] * 9)
    shutil.copytree(student, tmp_path / "twin")
    refuse_foreign_teachers(student, {"math": tmp_path / "twin"})
    speller = models("speller", ["xyzxyzxyz"] * 9)
    larger = models("larger", ["abcabcabc"] * 9, vocab=999)
    with pytest.raises(ValueError, match=r"'code'.*has tokenizer.*'agent'.*999 tokens"):
        refuse_foreign_teachers(student, {"math": tmp_path / "twin", "code": speller, "agent": larger})


def test_every_domain_gets_its_weighted_share_and_walks_through_its_pool():
    pools = {name: [Prompt(f"{name}/{i}", name, [], {}) for i in range(10)] for name in ("a", "b")}
    config = DistillConfig(prompts_per_step=8, weights={"a": 3.0})
    first, second = prompts_of_step(pools, config, 0), prompts_of_step(pools, config, 1)
    assert [len(first["a"]), len(first["b"])] == [6, 2]
    assert [p.id for p in first["a"] + second["a"]] == [f"a/{i % 10}" for i in range(12)]
