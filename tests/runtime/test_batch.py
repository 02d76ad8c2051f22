"""Packing keeps every sample whole, once, in rows of one teacher, and deals them evenly."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from runtime.batch import PackedSample, pack, split


def sample(length: int, number: int) -> PackedSample:
    tokens = [number * 1000 + i for i in range(length)]
    return PackedSample(tokens, [i > 0 and i % 2 == 1 for i in range(length)], {"value": tokens}, teacher="ab"[number % 2])


@given(st.lists(st.integers(2, 40), min_size=1, max_size=30), st.integers(8, 64))
def test_pack_keeps_every_sample_whole_once(lengths, row_tokens):
    samples = [sample(length, number) for number, length in enumerate(lengths)]
    rows = pack(samples, row_tokens=row_tokens)
    found = []
    for row in rows:
        assert row.cu_seqlens[0] == 0 and row.cu_seqlens[-1] == len(row.tokens) == len(row.targets)
        assert len(row.tokens) <= row_tokens or len(row.cu_seqlens) == 2
        np.testing.assert_array_equal(row.fields["value"], row.tokens.astype(np.float32))
        for begin, end in zip(row.cu_seqlens[:-1], row.cu_seqlens[1:], strict=True):
            number = row.tokens[begin] // 1000
            assert row.teacher == "ab"[number % 2] and not row.targets[begin]
            found.append(tuple(row.tokens[begin:end]))
    assert sorted(found) == sorted(tuple(s.tokens) for s in samples)


@given(st.lists(st.integers(2, 40), min_size=1, max_size=20), st.integers(1, 5))
def test_split_gives_every_rank_as_many_rows_and_every_target_once(lengths, ranks):
    rows = pack([sample(length, number) for number, length in enumerate(lengths)], row_tokens=48)
    dealt = split(rows, ranks)
    assert len({len(part) for part in dealt}) == 1
    assert sum(row.target_count for part in dealt for row in part) == sum(row.target_count for row in rows)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 30)), min_size=1, max_size=25), st.integers(8, 80))
def test_a_shared_beginning_is_computed_once_a_row(drawn, row_tokens):
    prompts = [[100 + n] * (5 + 7 * n) for n in range(4)]
    samples = []
    for number, (prompt, answer) in enumerate(drawn):
        tokens = prompts[prompt] + [1000 + number] * answer
        samples.append(PackedSample(tokens, [False] * len(prompts[prompt]) + [True] * answer, shared=len(prompts[prompt])))
    rows, found = pack(samples, row_tokens=row_tokens), []
    for row in rows:
        parts = [row.tokens[a:b].tolist() for a, b in _bounds(row)]
        found += parts
        beginnings = {part[0] for part in parts}
        alone = sum(len(part) for part in parts) if row.source is None else row.computed
        assert alone == sum(len(prompts[b - 100]) for b in beginnings) + sum(int(row.targets[a:b].sum()) for a, b in _bounds(row))
        assert row.computed <= row_tokens or len(parts) == 1
        if row.source is not None:
            computed = {}
            for token, source in zip(row.tokens, row.source, strict=True):
                assert computed.setdefault(int(source), token) == token
            assert sorted(computed) == list(range(row.computed))
    assert sorted(found) == sorted(s.tokens for s in samples)


def _bounds(row):
    return zip(row.cu_seqlens[:-1], row.cu_seqlens[1:], strict=True)


@given(st.lists(st.integers(2, 60), min_size=8, max_size=40), st.integers(1, 4))
def test_rows_are_as_many_as_the_ranks_share_evenly_and_nearly_equal(lengths, ranks):
    samples = [PackedSample([n] * length, [False] + [True] * (length - 1)) for n, length in enumerate(lengths)]
    rows = pack(samples, row_tokens=120, ranks=ranks)
    sizes = [len(row.tokens) for row in rows]
    fewest = -(-sum(lengths) // (120 * ranks)) * ranks
    assert len(rows) >= min(fewest, len(samples))
    assert max(sizes) - min(sizes) <= max(lengths) or len(rows) > fewest
