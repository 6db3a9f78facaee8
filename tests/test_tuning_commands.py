"""`graphopt tune` and `graphopt db`: what they print, write and refuse."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import helper, numpy_helper

from graphopt import errors, tuning
from graphopt.cli import group
from graphopt.targets.cpu import Cpu
from graphopt.targets.tuning import database, measure, peak, task
from graphopt.targets.tuning.database import Database, Key, Record, compiler_version


@pytest.fixture
def network(tmp_path, monkeypatch):
    """A convolution, a batch normalization and a ReLU, with a dynamic batch; searches that take little time."""
    monkeypatch.setenv("GRAPHOPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(measure, "WINDOW_S", 0.0)
    monkeypatch.setattr(measure, "FEWEST_CALLS", 1)
    monkeypatch.setattr(task, "PATIENCE", 1)
    monkeypatch.setattr(task, "PATIENCE_AT_BOUND", 1)
    rng = np.random.default_rng(0)
    weight = numpy_helper.from_array(rng.standard_normal((8, 4, 3, 3)).astype(np.float32), "w")
    rest = [numpy_helper.from_array(rng.uniform(0.5, 1, 8).astype(np.float32), name) for name in "sbmv"]
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1]),
            helper.make_node("BatchNormalization", ["c", "s", "b", "m", "v"], ["n"]),
            helper.make_node("Relu", ["n"], ["y"]),
        ],
        "test",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 4, 6, 6])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", 8, 6, 6])],
        [weight, *rest],
    )
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), path)
    return path


def _run(*arguments):
    return CliRunner().invoke(group, [str(a) for a in arguments], standalone_mode=False)


def _json(*arguments):
    result = _run(*arguments, "--format", "json")
    assert result.exception is None, result.exception
    return json.loads(result.stdout)


def test_tune_then_show_then_export(network, tmp_path):
    first = _json("tune", network, "--threads", 1, "--tune-seconds", 60, "-q")
    assert first["from_database"] == 0
    assert first["trials"] >= first["tasks"]
    assert first["kernels_us"] == pytest.approx(sum(r["time_us"] * r["calls"] for r in first["rows"]))
    assert first["database"] == str(tmp_path / "cache" / "schedules.jsonl")
    assert first["peaks"]["float32"] > 1
    (conv,) = [row for row in first["rows"] if "conv2d" in row["workload"]]
    assert "multiply" not in conv["workload"], "the batch normalization was not folded"
    assert 0 < conv["share_of_peak"] < 1.5
    again = _json("tune", network, "--threads", 1, "--tune-seconds", 60, "-q")
    assert (again["from_database"], again["trials"]) == (again["tasks"], 0)
    assert again["digest"] == first["digest"]
    fresh = _json("tune", network, "--threads", 1, "--tune-seconds", 60, "-q", "--fresh")
    assert fresh["from_database"] == 0
    shown = _json("db", "show", "--model", network, "--threads", 1)
    assert {entry["workload"] for entry in shown} == {
        k.workload for k, _ in Database(tmp_path / "cache/schedules.jsonl")
    }
    assert _json("db", "show", "--model", network, "--target", "cpu{mcpu=x86-64-v2,threads=1}") == []
    result = _run("db", "export", "-o", tmp_path / "out.jsonl", "--model", network, "--threads", 1)
    assert result.exception is None
    records, skipped = database.read(tmp_path / "out.jsonl")
    assert skipped == 0
    assert {k.workload for k in records} == {entry["workload"] for entry in shown}
    assert all(record.complete for record in records.values())


def test_tune_text(network):
    result = _run("tune", network, "--threads", 1, "--tune-seconds", 0, "-q")
    assert result.exception is None
    assert "conv2d_blocked" in result.stdout
    assert "time ran out" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tune-seconds", "-1"], "must not be negative"),
        (["--threads", "0"], "is not between 1 and"),
        (["--target", "cpux"], "did you mean 'cpu'"),
        (["--input", "x"], "cannot read --input"),
        (["--input", "z:1,4,6,6"], "z"),
    ],
)
def test_tune_refuses_in_one_line(network, arguments, said):
    result = _run("tune", network, *arguments)
    assert isinstance(result.exception, errors.GraphoptError)
    assert said in str(result.exception)
    assert result.exception.exit_code == errors.EXIT_USAGE


KEY = Key("a" * 24, "avx512", 1)


def _record(time_us, complete=True):
    return Record("conv2d_blocked", 1, {"columns": 7}, time_us, 5, complete, "conv", (1, 2), compiler_version())


def test_merge_keeps_the_faster(tmp_path):
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    other = Key("b" * 24, "avx2", 2)
    database.write(one, {KEY: _record(5.0)})
    database.write(two, {KEY: _record(4.0), other: _record(1.0, complete=False)})
    result = _run("db", "merge", one, two, "-o", tmp_path / "both.jsonl")
    assert result.exception is None
    assert "2 records" in result.stdout
    assert database.read(tmp_path / "both.jsonl")[0] == {KEY: _record(4.0), other: _record(1.0, complete=False)}
    result = _run("db", "export", tmp_path / "both.jsonl", "-o", tmp_path / "part.jsonl")
    assert "1 unfinished left out" in result.stdout
    (record,) = database.read(tmp_path / "part.jsonl")[0].values()
    assert record.tried == ()
    result = _run("db", "show", tmp_path / "both.jsonl", "--isa", "avx2")
    assert "unfinished" in result.stdout
    assert "1 records" in result.stdout


def test_db_refuses_in_one_line(tmp_path):
    (tmp_path / "other.txt").write_text("not a database\n")
    database.write(tmp_path / "one.jsonl", {KEY: _record(5.0)})
    for arguments, said in (
        (["show", tmp_path / "none.jsonl"], "no such file"),
        (["show", tmp_path / "other.txt"], "is no schedule database"),
        (["show", tmp_path / "one.jsonl", "--isa", "avx513"], "did you mean 'avx512'"),
        (["merge", tmp_path / "one.jsonl", tmp_path / "none.jsonl", "-o", tmp_path / "x"], "no such file"),
    ):
        result = _run("db", *arguments)
        assert isinstance(result.exception, errors.GraphoptError)
        assert said in str(result.exception)
        assert result.exception.exit_code == errors.EXIT_USAGE


def test_targets_take_threads_and_precision():
    assert tuning.resolve_target("cpu{threads=2}", 1) == Cpu(threads=1)
    assert getattr(tuning.resolve_target("cpu", 1, "bf16"), "precision", "") == "bfloat16"


def test_share_of_peak_by_element_type(monkeypatch):
    from graphopt.targets.base import TuningReport

    monkeypatch.setattr(peak, "peaks", lambda target: {"float32": 200.0, "int8": 800.0})
    rows = tuple({"gflops": g, "kind": k} for g, k in [(400.0, "int8"), (100.0, "float32"), (9.0, "bfloat16")])
    found = peak.with_shares(TuningReport(0, 0, 0, 0.0, "", (*rows, {"gflops": None, "kind": "int8"})), Cpu(threads=2))
    assert [row["share_of_peak"] for row in found.rows] == [pytest.approx(0.25), pytest.approx(0.25), None, None]
    assert found.peaks["int8"] == 800.0


def test_peaks_are_measured_for_floats_and_bytes():
    found = peak.peaks(Cpu(threads=1))
    assert found["float32"] > 1
    if Cpu().capabilities.dot_int8 == "avx2":  # three instructions a product, about as fast as those of floats
        assert found["int8"] > found["float32"] / 2
    else:
        assert found["int8"] > found["float32"]
