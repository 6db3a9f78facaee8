"""A model that TVM refuses runs in parts on two engines: right, raced like any other, whole as an artifact."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console

import graphopt
from graphopt import driver, guard, hybrid
from graphopt.candidates import Candidate, Compiler
from graphopt.errors import ArtifactError, DataError, TargetError
from graphopt.hybrid import with_hybrids
from graphopt.packaging import package
from graphopt.partition import cutting
from graphopt.progress import SILENT
from graphopt.report import CandidateRecord, Report
from graphopt.report.html import to_html
from graphopt.report.text import to_text
from graphopt.runtime import hybrid_engine
from graphopt.runtime.hybrid_engine import HybridEngine
from graphopt.runtime.onnxruntime_engine import OnnxRuntimeEngine
from graphopt.settings import Settings
from graphopt.targets.cpu import Cpu
from graphopt.targets.relax import importer
from graphopt.verify import Reference

FAST = {"tune_seconds": 0.0, "measure_seconds": 0.3, "threads": 1}
NAME = "exact · tvm+onnxruntime"


def convolutions(kind: str, batch: int | str = 1) -> onnx.ModelProto:
    """x f32[batch,8,8,8] -> Conv, Relu, something that TVM has not, Conv, Relu -> y, and more by `kind`."""
    rng = np.random.default_rng(0)
    weights = [numpy_helper.from_array(rng.normal(0, 0.2, (8, 8, 3, 3)).astype("f"), f"w{i}") for i in (1, 2)]
    conv: dict[str, Any] = {"pads": [1, 1, 1, 1]}
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["c1"], "conv1", **conv),
        helper.make_node("Relu", ["c1"], ["r1"], "relu1"),
    ]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, 8, 8, 8])]
    if kind == "contrib":
        nodes.append(helper.make_node("Trilu", ["r1"], ["g"], "triangle", domain="com.microsoft"))
    elif kind == "if":
        weights += [numpy_helper.from_array(np.array(0.2, np.float32), "half")]
        info = helper.make_tensor_value_info
        branches: dict[str, Any] = {
            name: helper.make_graph(
                [helper.make_node(op, ["r1", captured], [name], name)], name, [], [info(name, TensorProto.FLOAT, None)]
            )
            for name, op, captured in (("then_branch", "Mul", "m"), ("else_branch", "Sub", "half"))
        }
        nodes += [
            helper.make_node("ReduceMean", ["r1"], ["m"], "mean", keepdims=0),
            helper.make_node("Greater", ["m", "half"], ["positive"], "greater"),
            helper.make_node("If", ["positive"], ["g"], "if", **branches),
        ]
    nodes += [
        helper.make_node("Conv", ["g" if kind != "nonzero" else "r1", "w2"], ["c2"], "conv2", **conv),
        helper.make_node("Relu", ["c2"], ["y"], "relu2"),
    ]
    if kind == "nonzero":  # its output has another shape every time
        nodes += [
            helper.make_node("NonZero", ["y"], ["found"], "nonzero"),
            helper.make_node("Transpose", ["found"], ["places"], "transpose"),
        ]
        outputs.append(helper.make_tensor_value_info("places", TensorProto.INT64, ["n", 4]))
    graph = helper.make_graph(
        nodes, kind, [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 8, 8, 8])], outputs, weights
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def noise(seed: int, batch: int = 1, scale: float = 1.0) -> dict[str, np.ndarray]:
    return {"x": (scale * np.random.default_rng(seed).standard_normal((batch, 8, 8, 8))).astype(np.float32)}


@pytest.fixture
def always(monkeypatch):
    """However small the model, every part is worth a switch."""
    monkeypatch.setattr(cutting, "WORTH_S", 0.0)
    monkeypatch.setattr(hybrid, "SWITCH_S", -1.0)


def made(tmp_path: Path, kind: str, proto: onnx.ModelProto | None = None, **options) -> list[Candidate]:
    """The candidates of the exact variant that are compiled, whole and in parts; nothing is raced."""
    model = tmp_path / f"{kind}.onnx"
    onnx.save(convolutions(kind) if proto is None else proto, model)
    asked = Settings(model=str(model), target="cpu", preset="exact", **{**FAST, **options})
    settings, pipeline, _, target, place = driver._resolve(asked, None)
    report = Report(settings={}, environment={})
    source, data, _ = driver._load(settings, report)
    reference = Reference(source.model, data.samples, tmp_path)
    variants = driver._rewrite(
        source, pipeline, data, settings, target, reference, report, tmp_path, SILENT, lambda record: None
    )
    compiler = Compiler(target, place, settings, reference, data, tmp_path, SILENT)
    return with_hybrids([compiler.compile(variants[0], "float32", 0)], compiler)


ENGINES = {
    "contrib": ["tvm", "onnxruntime", "tvm"],
    "if": ["tvm", "onnxruntime", "tvm"],
    "nonzero": ["tvm", "onnxruntime"],
}


def check_same(run, model: Path, kind: str) -> None:
    """Within rounding of ONNX Runtime; and what one call gave, later calls do not touch."""
    wanted = OnnxRuntimeEngine(model, 1, optimize=False)
    kept = []
    for seed, scale in ((1, 1.0), (2, 4.0), (3, 0.01)):  # both branches of the If
        outputs = wanted.run(noise(seed, scale=scale))
        got = run(noise(seed, scale=scale))
        assert set(got) == set(outputs)
        assert np.abs(got["y"] - outputs["y"]).max() <= 1e-5 * np.abs(outputs["y"]).max()
        if kind == "nonzero":
            np.testing.assert_array_equal(got["places"], np.argwhere(got["y"]))
        kept.append((got, {name: array.copy() for name, array in got.items()}))
    for got, copies in kept:
        for name, array in got.items():
            np.testing.assert_array_equal(array, copies[name])


@pytest.mark.parametrize("kind", ["contrib", "nonzero"])
def test_what_tvm_lacks_runs_in_onnxruntime_and_the_rest_compiled(tmp_path, always, kind):
    whole, parted = made(tmp_path, kind)
    assert whole.record.status == "unavailable" and parted.name == NAME
    record = parted.record
    assert record.status == "measured" and record.engine == "hybrid" and record.errors and record.size_bytes > 10_000
    assert [part.engine for part in record.parts] == ENGINES[kind]
    assert whole.variant is not None and sum(part.nodes for part in record.parts) == whole.variant.record.nodes
    assert all(len(part.seconds) == (2 if part.engine == "tvm" else 0) for part in record.parts)
    check_same(HybridEngine(parted.path, 1).run, tmp_path / f"{kind}.onnx", kind)


def test_from_a_model_with_an_if_to_an_artifact_and_its_report(tmp_path, always, monkeypatch):
    """The If reads two values that are made outside; one condition, one branch, both compiled neighbours."""

    def parted_first(candidates, *_):
        measured = [c for c in candidates if c.record.status == "measured"]
        return sorted(measured, key=lambda c: c.record.engine != "hybrid")

    monkeypatch.setattr(driver, "choose", parted_first)
    model, out = tmp_path / "if.onnx", tmp_path / "out"
    onnx.save(convolutions("if", "N"), model)
    report = graphopt.optimize(model, out, preset="exact", **FAST).report
    (record,) = [c for c in report.candidates if c.name == NAME]
    assert record.latency is not None and record.speedup is not None
    assert [part.engine for part in record.parts] == ENGINES["if"]

    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["engine"] == "hybrid" and [p["engine"] for p in manifest["parts"]] == ENGINES["if"]
    files = {str(f.relative_to(out)) for f in (out / "hybrid").rglob("*") if f.is_file()}
    assert files <= set(manifest["files"]) and {"hybrid/hybrid.json", "hybrid/part-0/model.so"} <= files
    artifact = graphopt.load(out, threads=1)
    check_same(artifact.run, model, "if")
    wanted = OnnxRuntimeEngine(model, 1, optimize=False).run(noise(7, batch=3))["y"]  # parts are for a batch of one
    assert np.abs(artifact.run(noise(7, batch=3))["y"] - wanted).max() <= 1e-5 * np.abs(wanted).max()

    written = json.loads((out / "report.json").read_text())
    console = Console(record=True, width=200, file=io.StringIO())
    console.print(to_text(written))
    said, page = console.export_text(), (out / "report.html").read_text()
    assert f"Parts of {NAME}, in order" in said and "TVM compiles all of it" in said
    assert (why := "its condition is known at run time only") in said and why in page and ">Parts<" in page
    for candidate in written["candidates"]:  # a report of a run without hybrids, or of an older graphopt
        candidate.pop("parts")
    assert ">Parts<" not in to_html(written)

    with pytest.raises(TargetError, match="a package has one engine"):
        package(out, tmp_path / "package", "cpp")
    part = out / "hybrid" / "part-1.onnx"
    part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match=r"part-1\.onnx is damaged"):
        graphopt.load(out)


def test_parts_that_are_not_faster_go_back_and_it_is_said(tmp_path, monkeypatch):
    (_, small) = made(tmp_path, "contrib")
    assert small.record.reason == (
        "no part of it is worth compiling: TVM lacks com.microsoft.Trilu (triangle); "
        "4 nodes beside them: too little work to switch engines for"
    )
    monkeypatch.setattr(cutting, "WORTH_S", 0.0)
    monkeypatch.setattr(hybrid, "SWITCH_S", 1.0)
    (_, slow) = made(tmp_path, "contrib")
    assert slow.record.status == small.record.status == "unavailable" and not slow.record.parts
    assert slow.record.reason.startswith("no part of it is worth compiling: ")
    assert "not faster in TVM" in slow.record.reason


def test_a_node_that_tvm_imports_but_cannot_compile_is_found(tmp_path, always, monkeypatch):
    """TVM's compiler fails on whatever holds the second convolution."""
    build = Compiler.build_static

    def failing(self, model, *args):
        if any(node.name == "conv2" for node in model.graph):
            raise TargetError("TVM could not compile the model: something is wrong")
        return build(self, model, *args)

    monkeypatch.setattr(Compiler, "build_static", failing)
    (_, parted) = made(tmp_path, "contrib")
    assert [(p.engine, p.first, p.last) for p in parted.record.parts] == [
        ("tvm", "conv1", "relu1"),
        ("onnxruntime", "triangle", "conv2"),
        ("tvm", "relu2", "relu2"),
    ]
    assert "something is wrong (conv2)" in parted.record.parts[1].why


def test_a_model_that_loses_is_timed_piece_by_piece(tmp_path, always, monkeypatch):
    """As if TVM compiled the second convolution badly, and all else well."""
    proto = convolutions("contrib")
    del proto.graph.node[2]
    proto.graph.node[2].input[0] = "r1"

    def timed(compiled, file, feeds, threads):
        slow = any(node.name == "conv2" for node in onnx.load(file).graph.node)
        return {"tvm": 3e-3 if slow else 1e-3, "onnxruntime": 2e-3}

    monkeypatch.setattr(hybrid, "time_part", timed)
    monkeypatch.setattr(hybrid, "work_of", lambda *_: [1.0] * 4)
    whole, parted = made(tmp_path, "plain", proto)
    assert whole.record.status == parted.record.status == "measured"
    assert [(p.engine, p.first, p.last) for p in parted.record.parts] == [
        ("tvm", "conv1", "relu1"),
        ("onnxruntime", "conv2", "conv2"),
        ("tvm", "relu2", "relu2"),
    ]
    assert parted.record.parts[1].why == "not faster in TVM, 3.000 ms against 2.000 ms (conv2)"
    check_same(HybridEngine(parted.path, 1).run, tmp_path / "plain.onnx", "plain")
    monkeypatch.setattr(hybrid, "LOST_S", 2e-3)
    assert len(made(tmp_path, "plain", proto)) == 1


def test_a_wrong_part_is_noticed(tmp_path, always, monkeypatch):
    run = HybridEngine.run
    monkeypatch.setattr(HybridEngine, "run", lambda self, feeds: {n: a * 1.01 for n, a in run(self, feeds).items()})
    (_, parted) = made(tmp_path, "contrib")
    assert parted.record.status == "wrong" and "changed output 'y'" in parted.record.reason


def test_what_compiles_whole_or_is_for_tvm_alone_is_not_cut(tmp_path, always):
    assert [c.record.engine for c in made(tmp_path, "contrib", engine="tvm")] == ["tvm"]
    proto = convolutions("contrib")
    del proto.graph.node[2]
    proto.graph.node[2].input[0] = "r1"
    (whole,) = made(tmp_path, "plain", proto)
    assert whole.record.status == "measured"


@pytest.mark.long
@pytest.mark.shared
@pytest.mark.parametrize(("name", "inputs"), [("gtcrn", {}), ("nsnet2", {"features": (1, 100, 161)})])
def test_the_recurrent_denoisers_run_in_parts(tmp_path, shared_model, always, monkeypatch, name, inputs):
    """With their GRUs left to ONNX Runtime. `made` verifies them against the input model."""
    known = importer.has_importer
    monkeypatch.setattr(guard, "isolates", lambda: False)  # another process would not see what follows
    monkeypatch.setattr(importer, "has_importer", lambda node: node.op_type != "GRU" and known(node))
    refused = CandidateRecord("exact · tvm", "exact", "tvm", "unavailable", "TVM lacks GRU")
    monkeypatch.setattr(Compiler, "compile", lambda self, variant, *_: Candidate(refused, variant, tmp_path))
    (_, parted) = made(tmp_path, name, onnx.load(shared_model(name)), inputs=inputs)
    assert parted.record.status == "measured", parted.record.reason
    assert {"tvm", "onnxruntime"} == {part.engine for part in parted.record.parts}
    operators = {op for part in parted.record.parts if part.engine == "tvm" for op in part.operators}
    assert "GRU" not in operators and operators & {"MatMul", "Conv"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A hybrid folder, written by hand: relu compiled, then two outputs by ONNX Runtime, of which one is the input."""
    made = tmp_path_factory.mktemp("hybrid")
    info, kind = helper.make_tensor_value_info, TensorProto.FLOAT
    first = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["r"])], "a", [info("x", kind, [4])], [info("r", kind, [4])]
    )
    second = helper.make_graph(
        [helper.make_node("Mul", ["r", "x"], ["y"]), helper.make_node("NonZero", ["r"], ["z"])],
        "b",
        [info("r", kind, [4]), info("x", kind, [4])],
        [info("y", kind, [4]), info("z", TensorProto.INT64, [1, None])],
    )
    opsets = [helper.make_opsetid("", 17)]
    target = Cpu(threads=1)
    (made / "part-0").mkdir()
    model = graphopt.model.ir.from_proto(helper.make_model(first, opset_imports=opsets, ir_version=8))
    target.build(target.lower(model), made / "part-0")
    onnx.save(helper.make_model(second, opset_imports=opsets, ir_version=8), made / "part-1.onnx")
    kinds = {name: (np.dtype("float32"), (4,)) for name in ("x", "r", "y")}
    hybrid_engine.write_description(
        made,
        {"x": kinds["x"]},
        ["y", "z", "x"],
        {"r": kinds["r"], "y": kinds["y"]},
        [
            hybrid_engine.PartFiles("tvm", "part-0", ("x",), ("r",)),
            hybrid_engine.PartFiles("onnxruntime", "part-1.onnx", ("r", "x"), ("y", "z")),
        ],
    )
    return made


@settings(max_examples=20)
@given(values=st.lists(st.floats(-8, 8, width=32), min_size=4, max_size=4), threads=st.sampled_from([1, 2]))
def test_the_engine_runs_parts_in_order(folder, values, threads):
    engine = HybridEngine(folder, threads)
    x = np.array(values, np.float32)
    given_x = x.copy()
    for _ in range(2):
        out = engine.run({"x": x})
        np.testing.assert_array_equal(out["y"], np.maximum(given_x, 0) * given_x)
        np.testing.assert_array_equal(out["z"][0], np.flatnonzero(np.maximum(given_x, 0)))
        np.testing.assert_array_equal(out["x"], given_x)
        for array in out.values():
            array[...] = 7  # it is the caller's
    np.testing.assert_array_equal(x, given_x)


def test_the_engine_says_what_is_wrong_with_its_inputs(folder):
    engine = HybridEngine(folder, 1)
    assert (engine.input_shapes, engine.output_names) == ({"x": (4,)}, ("y", "z", "x"))
    assert engine.run({"x": np.zeros(4, np.float16)})["y"].dtype == np.float32
    for feeds, said in (
        ({}, "input 'x' is missing"),
        ({"x": np.zeros(3, "f")}, r"has shape \[3\], the model takes \[4\]"),
        ({"x": np.zeros(4, complex)}, "is complex128, the model takes float32"),
        ({"x": np.zeros(4, "f"), "q": np.zeros(1)}, "the model has no input 'q'"),
    ):
        with pytest.raises(DataError, match=said):
            engine.run(feeds)


def test_damaged_folders_are_refused(folder, tmp_path):
    with pytest.raises(ArtifactError, match=r"hybrid\.json is missing"):
        HybridEngine(tmp_path)
    described = json.loads((folder / "hybrid.json").read_text())
    for change, said in (({"format": 9}, "has format 9"), ({"parts": [{}]}, "is damaged"), ({"values": 3}, "damaged")):
        (tmp_path / "hybrid.json").write_text(json.dumps({**described, **change}))
        with pytest.raises(ArtifactError, match=said):
            HybridEngine(tmp_path)
    (tmp_path / "hybrid.json").write_text("{")
    with pytest.raises(ArtifactError, match="cannot be read"):
        HybridEngine(tmp_path)
    (tmp_path / "hybrid.json").write_text(json.dumps({**described, "parts": described["parts"][1:]}))
    (tmp_path / "part-1.onnx").write_bytes(b"no model")
    with pytest.raises(ArtifactError, match=r"ONNX Runtime cannot load .*part-1\.onnx"):
        HybridEngine(tmp_path)
