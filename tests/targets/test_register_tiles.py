"""Register tiles cover every output once, and name exactly the taps inside the picture."""

from __future__ import annotations

from hypothesis import assume, given
from hypothesis import strategies as st

from graphopt.targets.schedules.register_tiles import Axis


@given(
    length=st.integers(1, 40),
    kernel=st.integers(1, 7),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 4),
    before=st.integers(0, 5),
    after=st.integers(0, 5),
    tile=st.integers(1, 28),
)
def test_runs(length, kernel, stride, dilation, before, after, tile):
    span = length + before + after - (kernel - 1) * dilation - 1
    assume(span >= 0)
    axis = Axis(span // stride + 1, length, kernel, stride, dilation, before)
    wanted = {
        (output, tap)
        for output in range(axis.extent)
        for tap in range(kernel)
        if 0 <= output * stride + tap * dilation - before < length
    }
    runs = axis.runs(tile)
    assert [run.first for run in runs[1:]] == [run.first + run.size * run.count for run in runs[:-1]]
    assert (runs[0].first, sum(run.size * run.count for run in runs)) == (0, axis.extent)
    sizes = {run.size for run in runs}
    assert max(sizes) <= tile
    assert max(sizes) - min(sizes) <= 1
    found = []
    for run in runs:
        for first in range(run.first, run.first + run.size * run.count, run.size):
            if run.is_clipped:
                begin, count = (int(number) for number in axis.clipped(first))
                found += [(first, tap) for tap in range(begin, begin + count)]
            else:
                found += [
                    (first + i, tap)
                    for taps in run.taps
                    for tap in range(taps.first, taps.first + taps.count)
                    for i in taps.outputs
                ]
    assert sorted(found) == sorted(wanted)


def test_an_extent_no_tile_divides():
    """35 outputs in tiles of at most 14 are 12 + 12 + 11."""
    assert [(run.size, run.count) for run in Axis(35, 35, 1, 1, 1, 0).runs(14)] == [(12, 2), (11, 1)]
