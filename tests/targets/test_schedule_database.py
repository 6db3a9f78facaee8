"""The schedule database: its leniency, its layers, merging, and what of it is valid."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphopt.errors import TargetError
from graphopt.targets.tuning import database as databases
from graphopt.targets.tuning.database import Database, Key, Record, compiler_version

KEY = Key("digest", "avx512", 1)
NOW = compiler_version()


def _record(time_us=12.5, complete=True, decision=None, tvm=NOW, **rest):
    return Record("conv2d_blocked", 1, {"columns": 7} if decision is None else decision, time_us, 8, complete,
                  tvm=tvm, **rest)  # fmt: skip


def test_survives_torn_and_foreign_lines(tmp_path):
    path = tmp_path / "db.jsonl"
    Database(path).add(KEY, _record())
    with path.open("a") as handle:
        handle.write('not json\n{"workload": "x"}\n[1]\n{"workload": "torn", "mcp')
    again = Database(path)
    assert (len(again), again.skipped) == (1, 4)
    again.add(KEY, _record(11.0, decision={"columns": 9}))
    last = Database(path)
    assert last.find(KEY) == _record(11.0, decision={"columns": 9})
    assert last.skipped == 4


def test_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    database = Database(tmp_path / "other.jsonl")
    database.path = tmp_path / "file" / "db.jsonl"
    with pytest.raises(TargetError, match="cannot be written"):
        database.add(KEY, _record())
    with pytest.raises(TargetError, match="cannot be written"):
        databases.write(tmp_path / "file" / "db.jsonl", {})


def test_cannot_be_read(tmp_path):
    with pytest.raises(TargetError, match="cannot be read"):
        Database(tmp_path)
    with pytest.raises(TargetError, match="cannot be read"):
        databases.read(tmp_path / "missing.jsonl")


def test_a_users_record_wins_over_a_shipped_one(tmp_path):
    shipped, other = tmp_path / "data", Key("other", "avx512", 1)
    databases.write(shipped / "a.jsonl", {KEY: _record(1.0), other: _record(2.0)})
    path = tmp_path / "db.jsonl"
    database = Database(path, shipped)
    assert database.find(KEY) == _record(1.0)
    database.add(KEY, _record(5.0))
    assert Database(path, shipped).find(KEY) == _record(5.0)
    assert Database(path, shipped).find(other) == _record(2.0)
    assert len(Database(path, shipped)) == 1
    assert len(Database(path, shipped).everything()) == 2


def test_another_tvm_version_is_no_answer(tmp_path):
    database = Database(tmp_path / "db.jsonl", None)
    database.add(KEY, _record(tvm="0.1"))
    assert database.find(KEY) is None
    two = Key(KEY.workload, KEY.isa, 2)
    assert database.neighbours(two) == []
    database.add(KEY, _record())
    assert database.neighbours(two) == [_record()]
    assert database.neighbours(Key("else", KEY.isa, 2)) == []


def test_neighbours_nearest_first(tmp_path):
    database = Database(tmp_path / "db.jsonl", None)
    for threads in (1, 4, 16):
        database.add(dataclasses.replace(KEY, threads=threads), _record(float(threads)))
    times = [record.time_us for record in database.neighbours(dataclasses.replace(KEY, threads=6))]
    assert times == [4.0, 1.0, 16.0]


def test_merge_keeps_complete_then_faster():
    slow, fast, hasty = _record(9.0), _record(5.0), _record(1.0, complete=False)
    assert databases.merged([{KEY: slow}, {KEY: fast}]) == {KEY: fast}
    assert databases.merged([{KEY: fast}, {KEY: slow}]) == {KEY: fast}
    assert databases.merged([{KEY: hasty}, {KEY: slow}]) == {KEY: slow}
    assert databases.merged([{KEY: _record(0.5, tvm="0.26.0")}, {KEY: slow}]) == {KEY: slow}


records = st.builds(
    Record,
    st.sampled_from(["a", "b"]),
    st.integers(1, 3),
    st.dictionaries(st.sampled_from(["x", "y"]), st.integers() | st.text(max_size=3)),
    st.floats(0.001, 1e9),
    st.integers(1, 100),
    st.booleans(),
    st.text(max_size=5),
    st.lists(st.integers(0, 50), max_size=4).map(tuple),
    st.sampled_from([NOW, "0.1"]),
)
keys = st.builds(Key, st.sampled_from(["d1", "d2", "d3"]), st.sampled_from(["avx2", "avx512"]), st.integers(1, 3))


@given(st.dictionaries(keys, records))
def test_what_is_written_reads_the_same(content):
    text = databases.compact(content)
    assert databases.parse(text) == (content, 0)
    assert databases.compact(dict(reversed(content.items()))) == text


@given(st.lists(st.dictionaries(keys, records), max_size=3))
def test_merging_invents_nothing_and_loses_no_key(several):
    found = databases.merged(several)
    assert set(found) == {key for records in several for key in records}
    assert all(any(records.get(key) == record for records in several) for key, record in found.items())
    assert databases.merged([found, found]) == found
