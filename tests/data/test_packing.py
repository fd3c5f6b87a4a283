"""Packing of documents into rows."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gkachat.data.packing import pack_sizes


@settings(deadline=None)
@given(st.integers(1, 40).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.integers(0, 30), max_size=n + 1))))
def test_packing_uses_every_item_once_and_overfills_no_row(capacity_and_counts):
    capacity, counts = capacity_and_counts
    patterns = pack_sizes(np.array(counts, dtype=np.int64), capacity)
    assert all(times > 0 and 0 < sum(row) <= capacity for row, times in patterns)
    used = [size for row, times in patterns for size in row * times]
    assert sorted(used) == [size for size, count in enumerate(counts) if size for _ in range(count)]
    n_half_empty = sum(times for row, times in patterns if 2 * sum(row) <= capacity)
    assert n_half_empty <= 1  # two of them would have been one row


@pytest.mark.parametrize(
    ("sizes", "capacity", "rows"),
    [
        ([5, 4, 3, 2, 2], 8, [[5, 3], [4, 2, 2]]),
        ([8, 8, 1], 8, [[8], [8], [1]]),
        ([6, 3, 3, 3, 2], 9, [[6, 3], [3, 3, 2]]),
        ([2, 2, 2, 2, 2], 5, [[2, 2], [2, 2], [2]]),
    ],
)
def test_a_row_takes_the_longest_item_left_and_then_the_longest_that_fit(sizes, capacity, rows):
    assert [row for row, times in pack_sizes(np.bincount(sizes), capacity) for _ in range(times)] == rows
