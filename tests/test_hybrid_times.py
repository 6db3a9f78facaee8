"""Times of a part are among those that were taken, however few."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from graphopt.hybrid_times import lowest_tenth


@given(st.lists(st.floats(1e-6, 1.0), min_size=5, max_size=40))
def test_the_lowest_tenth_lies_between_the_least_and_the_median(samples):
    rounding = 1e-12  # it is interpolated
    least, middle = min(samples), sorted(samples)[len(samples) // 2]
    assert least * (1 - rounding) <= lowest_tenth(samples) <= middle * (1 + rounding)


def test_one_slow_run_of_five_changes_nothing():
    assert lowest_tenth([1.0, 1.0, 1.0, 1.0, 50.0]) == 1.0
