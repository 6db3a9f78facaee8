"""The tuner: what it records, what it reuses, how it ends early; and the database's leniency."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from graphopt.errors import TargetError
from graphopt.progress import SILENT
from graphopt.targets.cpu import Cpu
from graphopt.targets.tuning import measure, search
from graphopt.targets.tuning.database import Database, Key, Record
from tests.targets.oracle import TARGET, close, compiled, model, node, reference, sum_tolerance, uniform

KEY = Key("digest", "cascadelake", 1)


def _network():
    x = uniform(1, 1, 16, 8, 8)
    constants = {"w": uniform(2, 32, 16, 3, 3), "d": uniform(3, 32, 1, 3, 3), "v": uniform(4, 16, 32, 1, 1)}
    nodes = [
        node("Conv", ["x", "w"], ["a"], pads=[1, 1, 1, 1]),
        node("Conv", ["a", "d"], ["b"], pads=[1, 1, 1, 1], group=32),
        node("Conv", ["b", "v"], ["y"]),
    ]
    return model(nodes, {"x": x}, ["y"], constants), {"x": x}


@pytest.fixture
def quick(monkeypatch):
    """Timing that takes no time: the tests look at decisions, not at figures."""
    monkeypatch.setattr(measure, "REPEAT", 1)
    monkeypatch.setattr(measure, "MIN_REPEAT_MS", 0)
    monkeypatch.setattr(search, "MOST_CANDIDATES", 4)


def test_second_run_needs_no_search(tmp_path, quick):
    made, feeds = _network()
    database = tmp_path / "db" / "schedules.jsonl"
    first, second = TARGET.lower(made), TARGET.lower(made)
    one = TARGET.tune(first, seconds=120, database=database)
    two = TARGET.tune(second, seconds=120, database=database)
    assert (one.tasks, one.from_database) == (3, 0)
    assert one.trials > one.tasks
    assert not one.stopped_early
    assert (two.tasks, two.from_database, two.trials) == (3, 3, 0)
    assert one.digest == two.digest
    assert first.decisions == second.decisions
    assert all(row["time_us"] > 0 and row["gflops"] > 0 for row in two.rows)
    close(compiled(made, feeds, decisions=second.decisions), reference(made, feeds), sum_tolerance(16 * 9 * 9 * 32))


def test_no_time_means_valid_defaults(tmp_path):
    made, feeds = _network()
    lowered = TARGET.lower(made)
    report = TARGET.tune(lowered, seconds=0, database=tmp_path / "none.jsonl")
    assert (report.trials, report.from_database, report.stopped_early) == (0, 0, True)
    assert not (tmp_path / "none.jsonl").exists()
    close(compiled(made, feeds, decisions=lowered.decisions), reference(made, feeds), sum_tolerance(16 * 9 * 9 * 32))


def test_largest_kernels_come_first_and_time_ends_the_search(tmp_path, quick):
    made, _ = _network()
    lowered = TARGET.lower(made)
    report = TARGET.tune(lowered, seconds=1e-9 + 0.001, database=tmp_path / "db.jsonl")
    assert report.stopped_early
    assert report.trials <= 1
    macs = [row["gflops"] is not None for row in report.rows]
    assert macs == sorted(macs, reverse=True)


def test_interrupt_keeps_the_best_so_far(tmp_path, quick, monkeypatch):
    made, _ = _network()
    timed = []

    def interrupted(self, arguments):
        timed.append(len(timed))
        if len(timed) == 3:
            raise KeyboardInterrupt
        return 100.0 - len(timed)

    monkeypatch.setattr(measure.Candidate, "time_us", interrupted)
    lowered = TARGET.lower(made)
    with pytest.raises(KeyboardInterrupt):
        TARGET.tune(lowered, seconds=60, database=tmp_path / "db.jsonl")
    (line,) = (tmp_path / "db.jsonl").read_text().splitlines()
    entry = json.loads(line)
    assert entry["time_us"] == 98.0
    assert not entry["complete"]
    assert any(decision == entry["decision"] for _, decision in lowered.decisions.values())


def test_candidates_that_cannot_be_built_are_skipped(tmp_path, quick, monkeypatch):
    from tvm.error import InternalError

    made, _ = _network()
    real, count = measure.Candidate.__init__, []

    def failing(self, func, target):
        count.append(1)
        if len(count) % 2:
            raise InternalError("too many registers")
        real(self, func, target)

    monkeypatch.setattr(measure.Candidate, "__init__", failing)
    notes = []

    monkeypatch.setattr(type(SILENT), "note", lambda self, text: notes.append(text))
    report = TARGET.tune(TARGET.lower(made), seconds=60, database=tmp_path / "db.jsonl")
    assert report.trials > 3
    assert any("too many registers" in note for note in notes)


def test_another_target_or_thread_count_shares_nothing(tmp_path, quick):
    made, _ = _network()
    database = tmp_path / "db.jsonl"
    TARGET.tune(TARGET.lower(made), seconds=60, database=database)
    other = Cpu(mcpu="x86-64-v3", threads=1)
    assert other.tune(other.lower(made), seconds=0, database=database).from_database == 0


def test_tuning_for_a_processor_that_is_not_here(tmp_path, monkeypatch):
    made, _ = _network()
    target = Cpu(mcpu="x86-64-v3")
    lowered = target.lower(made)
    monkeypatch.setattr("graphopt.capabilities.host_features", lambda: frozenset({"sse4_2"}))
    with pytest.raises(TargetError, match="cannot be tuned here"):
        target.tune(lowered, seconds=1, database=tmp_path / "db.jsonl")
    assert target.tune(lowered, seconds=0, database=tmp_path / "db.jsonl").trials == 0


def test_database_survives_torn_and_foreign_lines(tmp_path):
    path = tmp_path / "db.jsonl"
    Database(path).add(KEY, Record("conv2d_blocked", 1, {"columns": 7}, 12.5, 8, True))
    with path.open("a") as handle:
        handle.write('not json\n{"workload": "x"}\n[1]\n{"workload": "torn", "mcp')
    again = Database(path)
    assert (len(again), again.skipped) == (1, 4)
    again.add(KEY, Record("conv2d_blocked", 1, {"columns": 9}, 11.0, 9, True))
    last = Database(path)
    assert last.find(KEY) == Record("conv2d_blocked", 1, {"columns": 9}, 11.0, 9, True)
    assert last.skipped == 4


def test_database_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    database = Database(tmp_path / "other.jsonl")
    database.path = tmp_path / "file" / "db.jsonl"
    with pytest.raises(TargetError, match="cannot be written"):
        database.add(KEY, Record("conv2d_blocked", 1, {}, 1.0, 1, True))


def test_workload_digest_is_the_same_in_every_process():
    made, _ = _network()
    from graphopt.targets.relax import pipeline

    here = sorted(search.workload_digest(f) for f in pipeline.prim_funcs(TARGET.lower(made).module).values())
    code = (
        "from tests.targets.test_tuning import _network, TARGET, search\n"
        "from graphopt.targets.relax import pipeline\n"
        "made, _ = _network()\n"
        "print(*sorted(search.workload_digest(f) for f in pipeline.prim_funcs(TARGET.lower(made).module).values()))"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert here == there


def test_arguments_have_no_denormals():
    made, _ = _network()
    from graphopt.targets.relax import pipeline

    for func in pipeline.prim_funcs(TARGET.lower(made).module).values():
        for tensor in measure.arguments_for(func, 0):
            assert np.all(tensor.numpy() >= 0.1)
