"""Latency by commit: lines that survive interruptions, levels that are found."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.ci.change_points import SHORTEST, change_points
from graphopt.ci.history import Entry, append, read, series
from graphopt.ci.history_page import BLOCKS, history_page, sparkline
from graphopt.errors import DataError


def entry(commit: str, seconds: float = 1.0, case: str = "a", machine: str = "m") -> Entry:
    return Entry(commit, "2026-01-01T00:00:00+00:00", case, machine, seconds, {"nodes": 3})


def test_lines_are_appended(tmp_path):
    file = tmp_path / "deep" / "latency.jsonl"
    append(file, [entry("1"), entry("2", 0.5)])
    before = file.read_bytes()
    append(file, [entry("3")])
    assert file.read_bytes().startswith(before)
    assert read(file) == ([entry("1"), entry("2", 0.5), entry("3")], 0)


@given(st.integers(1, 100))
def test_a_torn_line_costs_itself_only(tmp_path_factory, cut):
    file = tmp_path_factory.mktemp("torn") / "latency.jsonl"
    append(file, [entry("1"), entry("2")])
    file.write_bytes(file.read_bytes()[: -min(cut, len(entry("2").to_line()))])
    append(file, [entry("3")])
    found, spoilt = read(file)
    assert [e.commit for e in found] in (["1", "3"], ["1", "2", "3"])  # whole but for its line end: it is kept
    assert spoilt == 3 - len(found)


@pytest.mark.parametrize("text", ["", "nonsense\n", json.dumps({"schema": 2}) + "\n", "[]\n", "null\n"])
def test_a_file_without_entries_is_an_error(tmp_path, text):
    (tmp_path / "f").write_text(text)
    with pytest.raises(DataError):
        read(tmp_path / "f")
    with pytest.raises(DataError, match="cannot read"):
        read(tmp_path / "none")


def test_a_series_is_of_one_case_on_one_machine():
    found = series([entry("1", 1.0), entry("1", 3.0), entry("2", 2.0), entry("1", 2.0), entry("1", 9.0, machine="n")])
    assert [(e.commit, e.median_s) for e in found["a", "m"]] == [("1", 2.0), ("2", 2.0)]
    assert [e.median_s for e in found["a", "n"]] == [9.0]


def level(rng: np.random.Generator, seconds: float, count: int, noise: float) -> list[float]:
    return list(seconds * np.exp(rng.normal(0, noise, count)))


@pytest.mark.parametrize("seed", range(5))
def test_levels_up_and_down_are_found(seed):
    rng = np.random.default_rng(seed)
    values = [*level(rng, 1.0, 20, 0.01), *level(rng, 1.1, 12, 0.01), *level(rng, 1.0, 20, 0.01)]
    up, down = change_points(values)
    assert abs(up.index - 20) <= 1
    assert abs(down.index - 32) <= 1
    assert up.ratio == pytest.approx(1.1, abs=0.02)
    assert down.ratio == pytest.approx(1 / 1.1, abs=0.02)


def test_noise_is_seldom_called_a_change():
    """At most 2 of 100 series of 60: each of its few candidate changes may err with probability 0.01."""
    rng = np.random.default_rng(1)
    assert sum(bool(change_points(level(rng, 1.0, 60, 0.03))) for _ in range(100)) <= 4


def test_one_outlier_is_no_change():
    rng = np.random.default_rng(2)
    values = level(rng, 1.0, 40, 0.01)
    values[17] *= 3
    assert change_points(values) == []


def test_small_changes_may_be_left_out():
    values = [1.0, 1.001] * 10 + [1.02, 1.021] * 10
    assert [c.index for c in change_points(values)] == [20]
    assert change_points(values, least=0.05) == []


@settings(max_examples=50)
@given(st.lists(st.floats(1e-6, 1e3), min_size=0, max_size=40), st.floats(0.01, 100))
def test_changes_do_not_depend_on_the_unit(values, unit):
    found, scaled = change_points(values), change_points([v * unit for v in values])
    assert all(SHORTEST <= c.index <= len(values) - SHORTEST for c in found)
    assert [c.index for c in found] == [c.index for c in scaled] or len(found) != len(scaled)


def test_a_sparkline_is_logarithmic():
    assert sparkline([1, 10, 100]) == BLOCKS[0] + BLOCKS[4] + BLOCKS[7]
    assert sparkline([2.0, 2.0]) == BLOCKS[0] * 2


def test_the_page_names_what_changed():
    rng = np.random.default_rng(0)
    values = [*level(rng, 1.0, 10, 0.01), *level(rng, 1.5, 10, 0.01)]
    line = [entry(f"commit{k:02d}<", v, case="<case>") for k, v in enumerate(values)]
    page = history_page({("<case>", "m"): line}, {("<case>", "m"): change_points(values)})
    assert "commit10&lt;" in page
    assert "<case>" not in page
    assert math.isclose(page.count("<svg"), 1)
