"""GRPO's advantages and loss against their definitions."""

import pytest
import torch
import torch.nn.functional as F

from domains.types import Verdict
from rl.advantages import group_advantages
from rl.config import GrpoConfig
from rl.loop import refuse_broken_verifier, refuse_mismatch
from rl.loss import grpo
from runtime.objective import Rows


def verdicts(*rewards):
    return [Verdict(0.0, "infrastructure") if r is None else Verdict(r, "ok" if r else "wrong") for r in rewards]


def test_advantages_are_centred_per_prompt_and_infrastructure_counts_in_no_mean():
    got = group_advantages(verdicts(1.0, 0.0, 1.0, None, 0.0, 0.0, 0.0, 0.0), samples_per_prompt=4)
    assert got[3] is None
    assert got[:3] == pytest.approx([1 / 3, -2 / 3, 1 / 3]) and got[4:] == [0, 0, 0, 0]


def problem(seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(8, 5, generator=generator, requires_grad=True)
    head = torch.randn(11, 5, generator=generator, requires_grad=True)
    targets = torch.randint(0, 11, (8,), generator=generator)
    sample = torch.tensor([0, 0, 0, 1, 1, 1, 1, 2])
    now = F.log_softmax(hidden @ head.T, -1).gather(1, targets[:, None])[:, 0]
    fields = {
        "advantages": torch.tensor([0.5, -0.25, -0.25])[sample],
        "logprobs": now.detach() + 0.4 * torch.randn(8, generator=generator),
        "reference_logprobs": now.detach() + 0.3 * torch.randn(8, generator=generator),
    }
    return Rows(hidden, targets, fields, sample, 3, None), head


@pytest.mark.parametrize("kl_weight", [0.0, 0.05], ids=["no-kl", "kl"])
def test_loss_and_gradient_equal_the_written_out_objective(kl_weight):
    rows, head = problem()
    loss, metrics = grpo(rows, head, clip=(0.2, 0.28), kl_weight=kl_weight)
    logp = F.log_softmax(rows.hidden @ head.T, -1).gather(1, rows.targets[:, None])[:, 0]
    want = torch.zeros(())
    for t in range(8):
        r, a = (logp[t] - rows.fields["logprobs"][t]).exp(), rows.fields["advantages"][t]
        want = want - torch.min(r * a, r.clamp(0.8, 1.28) * a)
        gap = rows.fields["reference_logprobs"][t] - logp[t]
        want = want + kl_weight * r * (gap.exp() - gap - 1)
    torch.testing.assert_close(loss, want)
    for mine, theirs in zip(torch.autograd.grad(loss, (rows.hidden, head)), torch.autograd.grad(want, (rows.hidden, head)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    assert ("actor/kl" in metrics) == (kl_weight > 0)


def test_on_policy_gradient_is_the_plain_policy_gradient():
    rows, head = problem(1)
    logp = F.log_softmax(rows.hidden @ head.T, -1).gather(1, rows.targets[:, None])[:, 0]
    rows = rows._replace(fields=rows.fields | {"logprobs": logp.detach()})
    loss, metrics = grpo(rows, head, clip=(0.2, 0.28))
    want = -(logp * rows.fields["advantages"]).sum()
    for mine, theirs in zip(torch.autograd.grad(loss, (rows.hidden, head)), torch.autograd.grad(want, (rows.hidden, head)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    assert metrics["mismatch_kl/mean"] < 1e-6 and metrics["actor/clip_fraction"] == 0


def test_far_off_policy_samples_of_negative_advantage_are_masked_whole():
    rows, head = problem(2)
    fields = dict(rows.fields)
    logp = F.log_softmax(rows.hidden @ head.T, -1).gather(1, rows.targets[:, None])[:, 0].detach()
    fields["logprobs"] = logp + torch.tensor([0.0, 3.0, 0.0])[rows.sample]  # sample 1: rollout far more likely, advantage negative
    _, metrics = grpo(rows._replace(fields=fields), head, clip=(0.2, 0.28), mask_nats=1.0)
    assert metrics["actor/masked_fraction"] == 4


def test_a_run_stops_when_rollout_and_trainer_part():
    with pytest.raises(RuntimeError, match=r"mismatch_limit_nats=0\.02"):
        refuse_mismatch({"mismatch_kl/mean": 0.3}, GrpoConfig())
    with pytest.raises(RuntimeError, match="nan"):
        refuse_mismatch({"mismatch_kl/mean": float("nan")}, GrpoConfig())
    refuse_mismatch({"mismatch_kl/mean": 1e-6}, GrpoConfig())


def test_a_run_stops_when_the_verifier_breaks():
    with pytest.raises(RuntimeError, match="2 of 4"):
        refuse_broken_verifier(verdicts(None, 1.0, None, 0.0), GrpoConfig())
