"""The data cursor: every sample once an epoch, the same order for a seed, and no difference between one run and two halves."""

from experts.supervised import take
from runtime.batch import PackedSample


def samples(count):
    return [PackedSample([n] * (3 + n % 5), [False, True] + [True] * (1 + n % 5)) for n in range(count)]


def test_an_epoch_shows_every_sample_once():
    pool = samples(17)
    cursor, seen = 0, []
    while cursor < 34:
        cursor, chosen = take(pool, cursor, 1, seed=0)
        seen += [s.tokens[0] for s in chosen]
    assert sorted(seen[:17]) == sorted(seen[17:34]) == list(range(17))
    assert seen[:17] != seen[17:34]


def test_a_resumed_cursor_continues_the_same_sequence():
    pool = samples(10)
    cursor, chosen = take(pool, 0, 40, seed=3)
    _, rest = take(pool, cursor, 40, seed=3)
    again, first = take(pool, 0, 40, seed=3)
    assert (again, [s.tokens for s in first]) == (cursor, [s.tokens for s in chosen])
    assert [s.tokens for s in take(pool, cursor, 40, seed=3)[1]] == [s.tokens for s in rest]


def test_enough_tokens_are_taken_and_a_long_sample_alone_is_enough():
    assert sum(len(s.tokens) for s in take(samples(10), 0, 25, seed=1)[1]) >= 25
    assert len(take([PackedSample([1] * 500, [False] + [True] * 499)], 0, 25, seed=1)[1]) == 1
