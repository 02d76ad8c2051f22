"""What decoding at long contexts needs on a GPU: selection among a million entries, and attention to latents."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize(
    ("batch", "heads", "entries", "k"),
    [(300, 16, 700, 128), (1, 64, 32768, 512), (1, 64, 262144, 512), (2, 64, 300001, 2048), (1, 64, 1048576, 2048), (3, 5, 50, 100)],
    ids=str,
)
def test_entries_are_the_best_by_exact_scores(batch: int, heads: int, entries: int, k: int) -> None:
    select_entries = pytest.importorskip("model.kernels.indexer.listed").select_entries
    torch.manual_seed(0)
    q, weights = torch.randn(batch, heads, 128, device="cuda").bfloat16(), torch.randn(batch, heads, device="cuda")
    keys = torch.randn(batch, entries, 128, device="cuda", dtype=torch.bfloat16)
    count = torch.randint(0, entries + 1, (batch,), device="cuda", dtype=torch.int32)
    count[0] = entries
    rows, number = select_entries(q, keys, weights, count, k)
    assert torch.equal(number, count.clamp(max=k))
    for i in range(0, batch, max(1, batch // 3)):
        seen, found = int(count[i]), int(number[i])
        mine = rows[i, :found].long()
        assert bool((rows[i, found:] == -1).all()) and bool((mine.diff() > 0).all()) and bool((mine < seen).all())
        if seen > k:
            scores = (weights[i].double() @ (q[i].double() @ keys[i, :seen].double().T).relu_()).float()
            left = scores.clone()
            left[mine] = -torch.inf
            assert float(scores[mine].min()) >= float(left.max()) - 1e-3 * float(scores.abs().max())  # scores are sums in fp32


@pytest.mark.parametrize(("batch", "listed"), [(1, 2048), (3, 700), (200, 300)])
def test_attention_to_latents(batch: int, listed: int) -> None:
    attend_latents = pytest.importorskip("model.kernels.sparse_attention.listed").attend_latents
    torch.manual_seed(1)
    q, keys = torch.randn(batch, 128, 576, device="cuda").bfloat16() * 0.05, torch.randn(5000, 576, device="cuda").bfloat16()
    rows = torch.randint(len(keys), (batch, listed), device="cuda", dtype=torch.int32)
    count = torch.randint(1, listed + 1, (batch,), device="cuda", dtype=torch.int32)
    mine = keys[rows.long()].float()
    scores = torch.einsum("bhk,bsk->bhs", q.float(), mine)
    scores.masked_fill_(torch.arange(listed, device="cuda") >= count[:, None, None], -torch.inf)
    expected = torch.einsum("bhs,bsk->bhk", scores.softmax(2), mine[..., :512])
    assert error(attend_latents(q, keys, rows, count, values=512), expected) < 4e-3
