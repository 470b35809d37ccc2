"""The packing plan: every conversation once, no row over the sequence length, near the lower bound, a pure function."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastft.data.packing import lower_bound, pack

lengths_and_seq_len = st.integers(1, 64).flatmap(
    lambda w: st.tuples(st.lists(st.integers(1, w), max_size=60), st.just(w))
)


@given(lengths_and_seq_len, st.integers(0, 3), st.integers(0, 3))
def test_every_conversation_once_and_no_row_over_the_sequence_length(case, seed, epoch):
    lengths, seq_len = case
    rows = pack(np.array(lengths, dtype=np.int64), seq_len, seed, epoch)
    assert sorted(c for row in rows for c in row) == list(range(len(lengths)))
    assert all(sum(lengths[c] for c in row) <= seq_len for row in rows)
    assert len(rows) >= lower_bound(np.array(lengths), seq_len)


@given(st.lists(st.integers(1, 12), min_size=1, max_size=7))
def test_the_bound_never_exceeds_the_optimum(lengths):
    assert lower_bound(np.array(lengths), 12) <= _optimum(sorted(lengths, reverse=True), 12)


def _optimum(lengths: list[int], seq_len: int) -> int:
    best = len(lengths)

    def place(i: int, rows: list[int]) -> None:
        nonlocal best
        if len(rows) >= best:
            return
        if i == len(lengths):
            best = len(rows)
            return
        for r in range(len(rows)):
            if rows[r] + lengths[i] <= seq_len:
                place(i + 1, [*rows[:r], rows[r] + lengths[i], *rows[r + 1 :]])
        place(i + 1, [*rows, lengths[i]])

    place(0, [])
    return best


def test_the_plan_is_a_pure_function_and_epochs_differ():
    lengths = np.random.default_rng(0).integers(1, 200, 300)
    same = lambda a, b: len(a) == len(b) and all(map(np.array_equal, a, b))  # noqa: E731
    assert same(pack(lengths, 256, 7, 1), pack(lengths, 256, 7, 1))
    assert not same(pack(lengths, 256, 7, 1), pack(lengths, 256, 7, 2))
    assert not same(pack(lengths, 256, 7, 1), pack(lengths, 256, 8, 1))


def test_rows_of_long_tailed_lengths_are_nearly_full():
    lengths = np.minimum(8192, np.exp(np.random.default_rng(0).normal(6.8, 1.1, 20_000)).astype(int) + 10)
    rows = pack(lengths, 8192, 0, 0)
    assert lengths.sum() / (len(rows) * 8192) >= 0.995
    assert len(rows) <= 1.01 * lower_bound(lengths, 8192)


def test_a_conversation_longer_than_a_row_is_a_bug_of_the_caller():
    with pytest.raises(AssertionError, match="9 tokens do not fit into a row of 8"):
        pack(np.array([3, 9]), 8, 0, 0)


def test_without_conversations_there_are_no_rows():
    assert pack(np.array([], dtype=np.int64), 8, 0, 0) == []
    assert lower_bound(np.array([]), 8) == 0
