from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from graphopt.search.ledger import Ledger

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@given(entries=st.lists(st.tuples(st.sampled_from("ab"), st.text(max_size=5), VALUES), max_size=8))
def test_what_was_noted_is_found_again_the_last_of_a_key(tmp_path_factory, entries):
    path = tmp_path_factory.mktemp("ledger") / "deep" / "notes.jsonl"
    ledger, known = Ledger(path), {}
    for kind, key, value in entries:
        ledger.add(kind, key, value)
        known[kind, key] = value
    again = Ledger(path)
    assert len(again) == len(known)
    assert all(again.find(kind, key) == value for (kind, key), value in known.items())


def test_a_line_torn_by_a_crash_costs_that_line_alone(tmp_path):
    path = tmp_path / "notes.jsonl"
    ledger = Ledger(path)
    ledger.add("offer", "first", {"noise": 0.5})
    ledger.add("offer", "second", 2)
    path.write_bytes(path.read_bytes()[:-9])
    torn = Ledger(path)
    assert torn.find("offer", "first") == {"noise": 0.5}
    assert torn.find("offer", "second") is None
    torn.add("offer", "third", 3)
    assert Ledger(path).find("offer", "third") == 3
    assert json.loads(path.read_text().splitlines()[-1])["key"] == "third"


def test_two_that_write_at_once_lose_nothing(tmp_path):
    one, other = Ledger(tmp_path / "n.jsonl"), Ledger(tmp_path / "n.jsonl")
    for number in range(50):
        one.add("a", str(number), number)
        other.add("b", str(number), number)
    assert len(Ledger(tmp_path / "n.jsonl")) == 100
