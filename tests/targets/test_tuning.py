"""The tuner: what it records, what it reuses, in which order it works, and how it ends early."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest

from graphopt.errors import TargetError
from graphopt.progress import SILENT
from graphopt.targets.cpu import Cpu
from graphopt.targets.relax import pipeline
from graphopt.targets.schedules import Choice, conv2d_blocked
from graphopt.targets.schedules.workload import Workload
from graphopt.targets.tuning import measure, search, signature, task
from graphopt.targets.tuning.build_pool import BuildPool
from graphopt.targets.tuning.build_worker import Built, Order
from graphopt.targets.tuning.cost_model import Cost, Roofline
from graphopt.targets.tuning.database import Database, Key, Record
from graphopt.targets.tuning.tasks import constant_arguments, constant_bytes, find_tasks
from tests.targets.oracle import TARGET, close, compiled, model, node, reference, sum_tolerance, uniform

PROCESSORS = search.usable_processors()


def _network(size: int = 8):
    x = uniform(1, 1, 16, size, size)
    constants = {"w": uniform(2, 32, 16, 3, 3), "d": uniform(3, 32, 1, 3, 3), "v": uniform(4, 16, 32, 1, 1)}
    nodes = [
        node("Conv", ["x", "w"], ["a"], pads=[1, 1, 1, 1]),
        node("Conv", ["a", "d"], ["b"], pads=[1, 1, 1, 1], group=32),
        node("Conv", ["b", "v"], ["y"]),
    ]
    return model(nodes, {"x": x}, ["y"], constants), {"x": x}


def _tasks(database=None, target=TARGET):
    return find_tasks(target.lower(_network()[0]), target, database)


@pytest.fixture
def quick(monkeypatch):
    """Timing and searches that take little time: the tests look at decisions, not at figures."""
    monkeypatch.setattr(measure, "WINDOW_S", 0.0)
    monkeypatch.setattr(measure, "FEWEST_CALLS", 1)
    monkeypatch.setattr(task, "PATIENCE", 2)
    monkeypatch.setattr(task, "PATIENCE_AT_BOUND", 2)


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


def test_fresh_searches_again_and_everything_times_all_kernels(tmp_path, quick):
    made, _ = _network()
    database = tmp_path / "schedules.jsonl"
    TARGET.tune(TARGET.lower(made), seconds=120, database=database)
    lowered = TARGET.lower(made)
    report = search.Search(lowered, TARGET, database, 0, SILENT, fresh=True, everything=True).run(120)
    assert report.from_database == 0
    assert report.tasks == len(pipeline.prim_funcs(lowered.module))
    assert all(row["time_us"] > 0 for row in report.rows)


def test_no_time_means_valid_defaults(tmp_path):
    made, feeds = _network()
    lowered = TARGET.lower(made)
    report = TARGET.tune(lowered, seconds=0, database=tmp_path / "none.jsonl")
    assert (report.trials, report.from_database, report.stopped_early) == (0, 0, True)
    assert not (tmp_path / "none.jsonl").exists()
    close(compiled(made, feeds, decisions=lowered.decisions), reference(made, feeds), sum_tolerance(16 * 9 * 9 * 32))


def test_time_ends_the_search_within_one_candidate(tmp_path):
    made, _ = _network()
    begin = time.perf_counter()
    report = TARGET.tune(TARGET.lower(made), seconds=0.05, database=tmp_path / "db.jsonl")
    assert report.stopped_early
    assert time.perf_counter() - begin < 10  # building and timing a candidate is at most this on a busy machine


def test_every_kernel_gets_a_time_before_one_gets_a_second_trial():
    tasks = _tasks()
    roofline = Roofline()
    order = []
    for _ in range(len(tasks) + 1):
        chosen = max(task.unfinished(tasks, roofline), key=lambda t: t.priority(roofline))
        position = chosen.next_position()
        order.append(chosen)
        chosen.settle(position, 1e-3 * chosen.cost.macs, None, "run")
        roofline.observe(chosen.cost, 1e-3 * chosen.cost.macs)
    assert [id(t) for t in order[:-1]] == [id(t) for t in tasks]
    macs = [t.calls * t.cost.macs for t in order[:-1]]
    assert macs == sorted(macs, reverse=True)


def test_trials_go_where_most_can_be_saved():
    slow, fast = _tasks()[:2]
    roofline = Roofline({"float32": 1000.0})
    for each, time_us in ((slow, 900.0), (fast, 60.0)):
        each.settle(0, time_us, None, "run")
    assert slow.priority(roofline) > fast.priority(roofline)
    for position in range(1, 9):
        slow.settle(position, 1000.0, None, "run")
    assert slow.fruitless == 8
    assert slow.finished(roofline)
    assert not fast.finished(roofline)
    for position in range(1, 5):
        fast.settle(position, 100.0, None, "run")
    assert not fast.finished(roofline, run_us=1e3)
    assert fast.finished(roofline, run_us=1e9)  # what it may still save is nothing in such a model
    fast.calls = 100
    assert fast.priority(roofline) > slow.priority(roofline)


def test_settling_keeps_the_best_of_a_duel():
    (each, *_) = _tasks()
    assert each.settle(0, 100.0, None, "first")
    assert each.settle(1, 100.5, 104.0, "second")  # the best was slower when timed beside it
    assert (each.best, each.times[0], each.run) == (1, 104.0, "second")
    assert not each.settle(2, 101.0, None, "third")
    assert each.best == 1


def test_each_template_gets_its_first_guess(monkeypatch):
    (each, *_) = _tasks()
    rival = [Choice("rival", {"a": i}) for i in range(3)]
    direct = [choice for choice in each.choices if choice.template == "conv2d_blocked"]
    each.choices = [*direct[:2], *rival, *direct[2:]]
    tried = []
    for _ in range(2):
        tried.append(each.next_position())
        each.pending.add(tried[-1])
    assert [each.choices[p].template for p in tried] == ["conv2d_blocked", "rival"]
    assert not each.finished(Roofline())


def test_interrupt_keeps_the_best_so_far_and_the_next_run_goes_on(tmp_path, quick, monkeypatch):
    made, _ = _network()
    timed = []

    def interrupted(self, function, arguments):
        timed.append(len(timed))
        if len(timed) == 5:
            raise KeyboardInterrupt
        return 100.0 - len(timed)

    monkeypatch.setattr(measure.Bench, "time_us", interrupted)
    monkeypatch.setattr(measure.Bench, "duel", lambda self, one, other: (200.0, interrupted(self, one, other)))
    lowered = TARGET.lower(made)
    with pytest.raises(KeyboardInterrupt):
        TARGET.tune(lowered, seconds=60, database=tmp_path / "db.jsonl")
    entries = [json.loads(line) for line in (tmp_path / "db.jsonl").read_text().splitlines()]
    assert len(entries) >= 2
    unfinished = [entry for entry in entries if not entry["complete"]]
    assert unfinished
    for entry in entries:
        assert (entry["template"], entry["decision"]) in list(lowered.decisions.values())
    monkeypatch.undo()
    database = Database(tmp_path / "db.jsonl")
    for each in _tasks(database):
        record = database.find(each.key)
        if record is not None and not record.complete:
            assert each.choices[each.next_position()] == Choice(record.template, record.decision)
            assert len(each.tried) == len(record.tried) - 1
            assert each.time_us == record.time_us


def test_candidates_that_cannot_be_built_are_skipped(tmp_path, quick, monkeypatch):
    made, _ = _network()
    real = conv2d_blocked.match

    def wrong_first(workload):
        space = real(workload)
        return None if space is None else [{"columns": 5, "outs": 1, "order": "weights"}, *space]  # lacks rows

    monkeypatch.setattr(conv2d_blocked, "match", wrong_first)
    monkeypatch.setattr(conv2d_blocked, "predicted_cycles", lambda workload, decision: 0.0)
    notes = []
    monkeypatch.setattr(type(SILENT), "note", lambda self, text: notes.append(text))
    lowered = TARGET.lower(made)
    report = TARGET.tune(lowered, seconds=60, database=tmp_path / "db.jsonl")
    assert report.trials > 3
    assert any("cannot be built" in note for note in notes)
    assert all(decision.get("columns") != 5 for _, decision in lowered.decisions.values())


def test_a_compiler_process_that_dies_is_replaced():
    each = _tasks()[0]
    order = Order(each.plain_workload, each.choices[0], each.constants, TARGET.tvm_target(), "")
    with BuildPool(PROCESSORS[:1]) as pool:
        pool.submit("dead", Order(order.workload, order.choice, order.constants, order.target, pool.library()))
        pool.submit("alive", Order(order.workload, order.choice, order.constants, order.target, pool.library()))
        pool.workers[0].process.kill()
        results: dict[str, Built] = {}
        for _ in range(2):
            result = pool.next_result(60)
            assert result is not None
            results[result[0]] = result[1]
        assert "status -9" in results["dead"].problem
        assert not results["alive"].problem
        assert os.path.getsize(results["alive"].library) > 0
        assert pool.next_result(0) is None


def test_a_pool_serves_several_searches_one_after_another(tmp_path, quick):
    made, _ = _network()
    with TARGET.build_pool() as pool:
        assert pool is not None
        first = TARGET.tune(TARGET.lower(made), seconds=0.05, database=tmp_path / "one.jsonl", pool=pool)
        assert first.stopped_early
        assert pool.in_flight == 0
        lowered = TARGET.lower(_network(10)[0])
        second = TARGET.tune(lowered, seconds=120, database=tmp_path / "two.jsonl", pool=pool)
        assert not second.stopped_early
        assert pool.in_flight == 0
    found = Database(tmp_path / "two.jsonl", shipped=None)
    tasks = find_tasks(lowered, TARGET, None)
    assert {key for key, _ in found} == {each.key for each in tasks}


def test_what_another_size_was_best_with_is_tried_first_and_stands_without_time(tmp_path):
    near, far = TARGET.lower(_network(8)[0]), TARGET.lower(_network(10)[0])
    rows = {}
    there = {each.names[0]: [(c.template, c.decision) for c in each.choices] for each in find_tasks(far, TARGET, None)}
    for each in find_tasks(near, TARGET, None):
        alike = [choice for choice in each.choices if choice.template == each.choices[0].template]
        last = next((c for c in alike[:0:-1] if (c.template, c.decision) in there[each.names[0]]), alike[-1])
        decision = dict(last.decision)
        rows[each.names[0]] = {"template": last.template, "decision": decision, "time_us": 1.0}
    report = TARGET.tune(far, seconds=0, database=tmp_path / "none.jsonl", hints=rows)
    assert report.trials == 0
    taken = 0
    for each in find_tasks(far, TARGET, None):
        row = rows[each.names[0]]
        template, decision = far.decisions[each.names[0]]
        assert (template, decision) in [(choice.template, choice.decision) for choice in each.choices]
        taken += (template, decision) == (row["template"], row["decision"])
    assert taken
    untimed = {name: {**row, "time_us": None} for name, row in rows.items()}
    default = TARGET.lower(_network(10)[0])
    TARGET.tune(default, seconds=0, database=tmp_path / "none.jsonl", hints=untimed)
    assert default.decisions != far.decisions


def test_workers_stop_while_a_kernel_is_timed():
    def state(worker):
        with open(f"/proc/{worker.process.pid}/stat") as status:
            return status.read().rpartition(")")[2].split()[0]

    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    before = os.sched_getaffinity(0)
    with BuildPool(PROCESSORS) as pool:
        with pool.quiet(1):
            deadline = time.perf_counter() + 5
            while state(pool.workers[0]) != "T" and time.perf_counter() < deadline:
                time.sleep(0.01)
            assert state(pool.workers[0]) == "T"
            assert all(state(w) != "T" for w in pool.workers[1:])
        while state(pool.workers[0]) == "T" and time.perf_counter() < deadline:
            time.sleep(0.01)
        assert state(pool.workers[0]) != "T"
        pool.workers[0].signal(signal.SIGSTOP)
        pids = [w.process.pid for w in pool.workers]
    assert os.sched_getaffinity(0) == before
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)


def test_another_target_shares_nothing_another_thread_count_a_first_guess(tmp_path, quick):
    made, _ = _network()
    path = tmp_path / "db.jsonl"
    TARGET.tune(TARGET.lower(made), seconds=60, database=path)
    database = Database(path)
    other = Cpu(mcpu="x86-64-v2", threads=1)
    assert other.tune(other.lower(made), seconds=0, database=path).from_database == 0
    assert not any(each.hints for each in _tasks(database, other))
    more = Cpu(threads=2)
    for each in _tasks(database, more):
        assert each.known is None
        one_thread = database.find(Key(each.key.workload, each.key.isa, 1))
        assert one_thread is not None
        assert each.choice == Choice(one_thread.template, one_thread.decision)


def test_ideas_switched_off_are_another_search(tmp_path, quick):
    made, _ = _network()
    path = tmp_path / "db.jsonl"
    TARGET.tune(TARGET.lower(made), seconds=60, database=path)
    ablated = Cpu(threads=1, without="winograd")
    assert ablated.tune(ablated.lower(made), seconds=0, database=path).from_database == 0


def test_records_of_changed_templates_are_ignored(tmp_path, quick, monkeypatch):
    made, _ = _network()
    TARGET.tune(TARGET.lower(made), seconds=60, database=tmp_path / "db.jsonl")

    def by_direct_convolution() -> int:
        known = [each.known for each in _tasks(Database(tmp_path / "db.jsonl"))]
        return sum(record is not None and record.template == conv2d_blocked.NAME for record in known)

    assert by_direct_convolution()  # at least the 1x1 convolution, which has no other template
    monkeypatch.setattr(conv2d_blocked, "VERSION", conv2d_blocked.VERSION + 1)
    assert not by_direct_convolution()


def test_tuning_for_a_processor_that_is_not_here(tmp_path, monkeypatch):
    made, _ = _network()
    target = Cpu(mcpu="x86-64-v3")
    lowered = target.lower(made)
    monkeypatch.setattr("graphopt.capabilities.host_features", lambda: frozenset({"sse4_2"}))
    with pytest.raises(TargetError, match="cannot be tuned here"):
        target.tune(lowered, seconds=1, database=tmp_path / "db.jsonl")
    assert target.tune(lowered, seconds=0, database=tmp_path / "db.jsonl").trials == 0


def _digests():
    return sorted(each.key.workload for each in _tasks())


def test_workload_digest_is_the_same_in_every_process():
    code = "from tests.targets.test_tuning import _digests\nprint(*_digests())"
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert _digests() == there
    assert len(set(there)) == 3


def test_digest_goes_by_meaning():
    from tvm import te

    machine = TARGET.machine()

    def function(names, factor, size=64):
        x = te.placeholder((size,), "float32", name=names[0])
        y: Any = te.compute((size,), lambda i: x[i] * factor, name=names[1])
        return Workload(te.create_prim_func([x, y]).with_attr("global_symbol", names[0]), machine)

    base = signature.workload_digest(function(("x", "scaled"), 2.0))
    assert signature.workload_digest(function(("other", "scaled"), 2.0)) == base
    different = [
        signature.workload_digest(function(("x", "scaled"), 3.0)),
        signature.workload_digest(function(("x", "scaled"), 2.0, 128)),
        signature.workload_digest(function(("x", "conv2d"), 2.0)),  # templates know blocks by name
        signature.workload_digest(function(("x", "scaled"), 2.0), constants=(0,)),
        signature.workload_digest(function(("x", "scaled"), 2.0), without=("winograd",)),
    ]
    assert len({base, *different}) == 6


def test_isa_classes():
    from graphopt.capabilities import X86_FEATURES

    def of(mcpu):
        return signature.isa_class("x86_64", X86_FEATURES[mcpu])

    assert {of("sapphirerapids"), of("emeraldrapids"), of("graniterapids")} == {"avx512-amx"}
    assert {of("znver4"), of("cooperlake")} == {"avx512-bf16"}
    assert {of("cascadelake"), of("icelake-server")} == {"avx512-vnni"}
    assert (of("skylake-avx512"), of("alderlake"), of("haswell"), of("x86-64-v2")) == (
        "avx512", "avx2-vnni", "avx2", "sse",
    )  # fmt: skip
    assert signature.isa_class("aarch64", frozenset({"asimd"})) == "neon"
    assert signature.isa_class("aarch64", frozenset({"asimd", "asimddp"})) == "neon-dot"


def test_constants_of_kernels():
    lowered = TARGET.lower(_network()[0])
    held = constant_arguments(lowered.module)
    with_weights = [name for name, indices in held.items() if indices]
    assert len(with_weights) == 3
    assert constant_bytes(lowered.module) == 4 * (32 * 16 * 9 + 32 * 9 + 16 * 32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "uint8", "bool", "int64"])
def test_arguments_are_aligned_apart_and_finite(dtype):
    bench = measure.Bench(0)
    params = [measure.Parameter((3, 5), dtype), measure.Parameter((7, 9), dtype, True), measure.Parameter((4,), dtype)]
    rows = bench.arguments(params)
    first, second = next(rows), next(rows)
    assert first[0].same_as(second[0]) or first[0] is second[0]
    addresses = []
    for tensor, parameter in zip([*first, second[1]], [*params, params[1]], strict=True):
        assert (tuple(tensor.shape), str(tensor.dtype)) == (parameter.shape, dtype)
        stored = tensor._create_view(parameter.shape, "uint16") if dtype == "bfloat16" else tensor
        array = stored.numpy()
        if dtype == "bfloat16":
            array = (array.astype(np.uint32) << 16).view(np.float32)
        assert np.all(array >= (0 if array.dtype.kind in "biu" else 0.099))
        assert np.all(array <= 1)
    for tensor in (first[1], second[1]):
        if dtype in ("float32", "int8", "uint8", "int64"):
            addresses.append(np.from_dlpack(tensor).ctypes.data)
    assert all(address % measure.ALIGNMENT == 0 for address in addresses)
    assert len(set(addresses)) == len(addresses)


def test_constants_rotate_through_more_than_a_cache():
    bench = measure.Bench(0)
    rows = bench.arguments([measure.Parameter((1 << 18,), "float32", True)])
    addresses = {np.from_dlpack(next(rows)[0]).ctypes.data for _ in range(64)}
    assert len(addresses) * (1 << 20) == measure.ARENA_BYTES[0]


def test_a_constant_larger_than_the_arena_is_timed_too(monkeypatch):
    monkeypatch.setattr(measure, "ARENA_BYTES", (1 << 12, 1 << 14))
    rows = measure.Bench(1 << 20).arguments([measure.Parameter((1 << 16,), "float32", True)])
    assert tuple(next(rows)[0].shape) == (1 << 16,)


def test_quantile_ignores_interference(monkeypatch):
    monkeypatch.setattr(measure, "WINDOW_S", 0.05)
    calls = []

    def sometimes_slow(seconds):
        calls.append(seconds)
        end = time.perf_counter() + (0.01 if len(calls) % 3 == 0 else 0.001)
        while time.perf_counter() < end:
            pass

    taken = measure.Bench(0).time_us(sometimes_slow, iter(lambda: [1], None))
    assert 900 < taken < 5000


def test_roofline():
    roofline = Roofline()
    small = Cost(1_000_000, 0, 4096, "float32")
    assert roofline.bound_us(small) == 0
    roofline.observe(small, 10.0)
    roofline.observe(small, 20.0)
    assert roofline.bound_us(small) == pytest.approx(10.0)
    heavy = Cost(1000, 30_000_000, 0, "float32")
    assert roofline.bound_us(heavy) == pytest.approx(1000.0)
    assert roofline.bound_us(Cost(1000, 0, 0, "int8")) == 0


def test_hint_of_a_record_that_is_no_longer_offered(tmp_path):
    database = Database(tmp_path / "db.jsonl", shipped=None)
    (each, *_) = _tasks()
    version = conv2d_blocked.VERSION
    from graphopt.targets.tuning.database import compiler_version

    gone = Record("conv2d_blocked", version, {"columns": 99}, 1.0, 1, True, tvm=compiler_version())
    database.add(each.key, gone)
    (again, *_) = _tasks(database)
    assert again.known is None
    assert again.hints == []
