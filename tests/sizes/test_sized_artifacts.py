"""`--sizes`: one artifact runs every size, each by what was faster, and right."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto as T
from onnx import helper, numpy_helper
from rich.console import Console

import graphopt
from graphopt.errors import ArtifactError, DataError, SpecError, TargetError
from graphopt.model import Signature, TensorSpec
from graphopt.packaging import package
from graphopt.report import SizeRecord
from graphopt.report.html import to_html
from graphopt.report.text import to_text
from graphopt.runtime.onnxruntime_engine import OnnxRuntimeEngine
from graphopt.runtime.sized_engine import SizedEngine
from graphopt.settings import Settings, read_recipe
from graphopt.sizes import build
from graphopt.sizes.build import _settled
from graphopt.sizes.plan import SizePlan

HEADS, WIDTH, WORDS = 2, 32, 50
FAST = {"tune_seconds": 0.0, "measure_seconds": 0.3, "threads": 1}


def encoder() -> onnx.ModelProto:
    """ids i64[batch,seq], mask i64[batch,seq] -> embeddings f32[batch,seq,32], their masked mean f32[batch,32]."""
    rng = np.random.default_rng(0)
    constants = {
        "table": rng.standard_normal((WORDS, WIDTH)).astype("f4"),
        **{name: (rng.standard_normal((WIDTH, WIDTH)) / 6).astype("f4") for name in ("wq", "wk", "wv", "wo")},
        "heads": np.array([0, 0, HEADS, WIDTH // HEADS]),
        "joined": np.array([0, 0, WIDTH]),
        "scale": np.float32(4),
        "one": np.float32(1),
        "low": np.float32(np.finfo(np.float32).min),
        "12": np.array([1, 2]),
        "2": np.array([2]),
        "1": np.array([1]),
    }
    node = helper.make_node
    nodes = [
        node("Gather", ["table", "ids"], ["e"], "words"),
        node("Cast", ["mask"], ["m"], "as_float", to=T.FLOAT),
        node("Sub", ["one", "m"], ["gone"], "gone"),
        node("Mul", ["gone", "low"], ["bias"], "bias"),
        node("Unsqueeze", ["bias", "12"], ["bias4"], "bias4"),
        *(node("MatMul", ["e", f"w{n}"], [n], n) for n in "qkv"),
        *(node("Reshape", [n, "heads"], [f"{n}h"], f"{n}h") for n in "qkv"),
        node("Transpose", ["qh"], ["qt"], "qt", perm=[0, 2, 1, 3]),
        node("Transpose", ["kh"], ["kt"], "kt", perm=[0, 2, 3, 1]),
        node("Transpose", ["vh"], ["vt"], "vt", perm=[0, 2, 1, 3]),
        node("MatMul", ["qt", "kt"], ["s"], "scores"),
        node("Div", ["s", "scale"], ["sd"], "scaled"),
        node("Add", ["sd", "bias4"], ["sm"], "masked"),
        node("Softmax", ["sm"], ["p"], "softmax", axis=-1),
        node("MatMul", ["p", "vt"], ["c"], "context"),
        node("Transpose", ["c"], ["ct"], "ct", perm=[0, 2, 1, 3]),
        node("Reshape", ["ct", "joined"], ["cj"], "cj"),
        node("MatMul", ["cj", "wo"], ["o"], "out"),
        node("Add", ["o", "e"], ["embeddings"], "residual"),
        node("Unsqueeze", ["m", "2"], ["m3"], "m3"),
        node("Mul", ["embeddings", "m3"], ["kept"], "kept"),
        node("ReduceSum", ["kept", "1"], ["sum"], "sum", keepdims=0),
        node("ReduceSum", ["m3", "1"], ["count"], "count", keepdims=0),
        node("Div", ["sum", "count"], ["mean"], "mean"),
    ]
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "encoder",
        [info("ids", T.INT64, ["batch", "seq"]), info("mask", T.INT64, ["batch", "seq"])],
        [info("embeddings", T.FLOAT, ["batch", "seq", WIDTH]), info("mean", T.FLOAT, ["batch", WIDTH])],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def feeds(batch: int, size: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    mask = rng.integers(0, 2, (batch, size))
    mask[:, 0] = 1
    return {"ids": rng.integers(0, WORDS, (batch, size)), "mask": mask}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("sizes") / "encoder.onnx"
    onnx.save(encoder(), path)
    return path


@pytest.fixture(scope="module")
def made(model):
    """An artifact for sequences of 4 to 12, in which every size is compiled: on a busy machine some might not win."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "_settled", lambda record, race, by_input: record)
        patch.setattr(build, "LEAST_SECONDS", 0.1)
        return graphopt.optimize(model, model.parent / "artifact", sizes=("seq=4..12",), **FAST)


def test_every_size_is_right(made, model):
    artifact, wanted = made.load(), OnnxRuntimeEngine(model, 1, optimize=False).run
    compiled = SizedEngine(made.path / "compiled", 1)
    for size in range(1, 20):
        for batch in (1, 3):
            given = feeds(batch, size, seed=size)
            held = compiled.run_if_held(given)
            assert (held is not None) == (batch == 1 and 4 <= size <= 12)
            for found in (artifact.run(given), *([] if held is None else [held])):
                for name, array in wanted(given).items():
                    assert found[name].shape == array.shape
                    np.testing.assert_allclose(found[name], array, rtol=1e-4, atol=1e-5)


def test_what_is_returned_is_the_callers(made):
    compiled = SizedEngine(made.path / "compiled", 1)
    first = compiled.run(feeds(1, 5))
    kept = {name: array.copy() for name, array in first.items()}
    compiled.run(feeds(1, 6, seed=9))
    for name, array in first.items():
        np.testing.assert_array_equal(array, kept[name])
        assert array.flags.c_contiguous
        assert array.flags.writeable


def test_a_row_without_anything_is_not_padded(made, model):
    """Its attention is a mean over all positions: padded ones would count."""
    given = feeds(1, 5)
    given["mask"][:] = 0
    compiled = SizedEngine(made.path / "compiled", 1)
    assert compiled.run_if_held(given) is None
    wanted = OnnxRuntimeEngine(model, 1, optimize=False).run(given)
    np.testing.assert_allclose(made.load().run(given)["embeddings"], wanted["embeddings"], rtol=1e-4, atol=1e-5)


def test_feeds_that_fit_no_function(made):
    compiled = SizedEngine(made.path / "compiled", 1)
    given = feeds(1, 8)
    for wrong in (
        {"ids": given["ids"]},
        {**given, "more": given["ids"]},
        {**given, "mask": given["mask"].astype(np.int32)},
        {**given, "mask": given["mask"][:, :7]},
        {**given, "mask": given["mask"][0]},
    ):
        assert compiled.run_if_held(wrong) is None
    with pytest.raises(DataError, match="nothing was compiled for ids"):
        compiled.run(feeds(2, 8))
    with pytest.raises(DataError, match="dtype"):
        made.load().run({**given, "mask": given["mask"].astype(np.int32)})


def test_the_description(made):
    described = json.loads((made.path / "compiled" / "engine.json").read_text())
    assert [e["sizes"]["seq"] for e in described["entries"]] == [[4, 4], [5, 6], [7, 8], [9, 12]]
    assert described["guards"] == [["mask", 1, False]]
    assert described["outputs"] == {"embeddings": [[1, "seq"]]}


def test_it_is_reported(made):
    report = made.report.to_dict()
    assert [each["sizes"] for each in report["sizes"]] == [
        "batch=1 seq=4", "batch=1 seq=5..6", "batch=1 seq=7..8", "batch=1 seq=9..12",
    ]  # fmt: skip
    assert [len(each["speedups"]) for each in report["sizes"]] == [1, 2, 2, 2]
    printed = io.StringIO()
    Console(file=printed, width=200).print(to_text(report))
    assert "batch=1 seq=9..12" in printed.getvalue()
    assert "batch=1 seq=9..12" in to_html(json.loads(json.dumps(report)))
    assert read_recipe(made.path / "recipe.toml")["sizes"] == ("seq=4..12",)


def test_it_cannot_be_packaged(made, tmp_path):
    with pytest.raises(TargetError, match="several sizes"):
        package(made.path, tmp_path / "package", "python")


@pytest.mark.parametrize("harm", [{"entries": []}, {"entries": [{}]}, {"dimensions": 1}, {"guards": [["mask"]]}])
def test_a_damaged_description(made, tmp_path, harm):
    folder = shutil.copytree(made.path / "compiled", tmp_path / "compiled")
    described = json.loads((folder / "engine.json").read_text()) | harm
    (folder / "engine.json").write_text(json.dumps(described))
    with pytest.raises(ArtifactError, match="damaged"):
        SizedEngine(folder, 1)


def test_a_size_that_is_not_faster_stays_with_onnxruntime():
    record = SizeRecord("seq=8", "compiled")
    assert _settled(record, None, False).status == "compiled"
    slow: Any = _Race({("variant · tvm", "input · onnxruntime"): 0.5, ("variant · tvm", "variant · onnxruntime"): 1.2})
    assert _settled(record, slow, True).status == "compiled"
    assert _settled(record, slow, False).status == "onnxruntime"


class _Race:
    """Ratios of seconds, as `PairedResult.session_ratios` gives them."""

    def __init__(self, ratios):
        self.ratios = ratios

    def session_ratios(self, one, other):
        middle = self.ratios[one, other]
        return [type("Ratio", (), {"median": middle, "low": middle - 0.01, "high": middle + 0.01})]


def test_sizes_that_may_not_be_padded_are_refused_at_once(tmp_path):
    proto = encoder()
    for node in proto.graph.node:
        if node.name == "masked":
            node.input[1] = "scale"
    onnx.save(proto, tmp_path / "m.onnx")
    with pytest.raises(SpecError, match=r"--sizes batch=1 seq=5..6: seq cannot be padded up to 6: Softmax"):
        graphopt.optimize(tmp_path / "m.onnx", tmp_path / "out", sizes=("seq=4..6",), **FAST)
    assert not (tmp_path / "out").exists()


def test_a_variant_that_cannot_be_padded_costs_no_run(monkeypatch):
    """The exact variant could be; what passes then made of it is known only after hours, perhaps."""

    def refused(*_):
        raise SpecError("seq cannot be padded")

    monkeypatch.setattr(SizePlan, "proved", refused)
    signature = Signature((TensorSpec("x", np.dtype("f4"), ("seq",)),), ())
    plan = SizePlan.of(signature, ["seq=4..8"])
    variant: Any = SimpleNamespace(model=None)
    chosen: Any = SimpleNamespace(variant=variant)
    compiler: Any = SimpleNamespace(work=None)
    made = build.make_sized(chosen, variant, plan, compiler, compiler)
    assert made.path is None
    assert {record.status for record in made.records} == {"unavailable"}
    assert "cannot be padded" in made.records[0].reason


def test_where_sizes_are_not_for(model, tmp_path):
    with pytest.raises(SpecError, match="--sizes is for one target"):
        graphopt.optimize(model, tmp_path / "out", sizes=("seq=4",), target="cpu,cpu{mcpu=haswell}", **FAST)


def test_settings_keep_sizes():
    settings = Settings("m.onnx", sizes=("seq=4..12", "batch=2 seq=7"))
    assert 'sizes = ["seq=4..12", "batch=2 seq=7"]' in settings.to_toml()
    assert "sizes" not in Settings("m.onnx").to_toml()
