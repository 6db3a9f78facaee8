"""Bad input: one clear line saying what, where and what to do; the documented exit code; nothing half-written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from tests.models import save_labelled_data, save_small_cnn, small_cnn

FAST = ("--tune-seconds", "0", "--measure-seconds", "1", "--threads", "1", "-q")


def graphopt(*arguments: str | Path | int, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "graphopt.cli", *map(str, arguments)], capture_output=True, text=True, timeout=timeout
    )


def refused(result: subprocess.CompletedProcess[str], *wanted: str, code: int = 2) -> None:
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert result.returncode == code, result.stderr
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("graphopt: error: ")
    for text in wanted:
        assert text in lines[0]
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


@pytest.fixture
def model(tmp_path) -> Path:
    return save_small_cnn(tmp_path)


@pytest.fixture(autouse=True)
def _nothing_half_written(tmp_path):
    yield
    assert not [p.name for p in tmp_path.iterdir() if p.name.startswith(".")]
    assert not (tmp_path / "out").exists()


def unknown_domain(path: Path) -> None:
    node = helper.make_node("Fancy", ["x"], ["y"], "fancy1", domain="com.example")
    value = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1]) for n in "xy"]
    graph = helper.make_graph([node], "g", value[:1], value[1:])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.example", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)


def invalid_graph(path: Path) -> None:
    model = small_cnn()
    model.graph.node[4].input[0] = "nowhere"
    path.write_bytes(model.SerializeToString())


def truncated(path: Path) -> None:
    data = small_cnn().SerializeToString()
    path.write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize(
    ("make", "wanted"),
    [
        (lambda p: None, "no such file"),
        (lambda p: p.mkdir(), "is a folder"),
        (lambda p: p.write_bytes(b""), "empty"),
        (lambda p: p.write_text("hello, this is not a protobuf file at all"), "not"),
        (truncated, "truncated"),
        (invalid_graph, "nowhere"),
        (unknown_domain, "com.example"),
    ],
    ids=["missing", "folder", "empty", "text", "truncated", "invalid", "unknown-domain"],
)
def test_a_model_that_cannot_be_read(tmp_path, make, wanted):
    make(tmp_path / "bad.onnx")
    refused(graphopt("optimize", tmp_path / "bad.onnx", "-o", tmp_path / "out", *FAST), wanted)


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (("--passes", "simplfy"), ("unknown pass 'simplfy'", "did you mean 'simplify'?")),
        (("--passes", "simplify{fast=1}"), ("no option 'fast'",)),
        (("--passes", "simplify{"), ("expected", "grammar")),
        (("--preset", "int9"), ("unknown preset 'int9'", "int8")),
        (("--target", "cpuu"), ("unknown target 'cpuu'", "did you mean 'cpu'?")),
        (("--target", "cpu{mcpu=cascadelak}"), ("cascadelake",)),
        (("--input", "y:1,3,8,8"), ("no input 'y'", "x")),
        (("--input", "x:1,3,8"), ("rank 4",)),
        (("--input", "x:1,4,8,8"), ("fixed to 3",)),
        (("--input", "x"), ("name:1,3,224,224",)),
        (("--max-drop", "-1"), ("negative",)),
        (("--threads", "0"), ("at least 1",)),
        (("--preset", "int8"), ("needs calibration data", "--calib")),
        (("--preset", "int8", "--calib", "missing.npz"), ("missing.npz",)),
        (("--config", "missing.toml"), ("missing.toml",)),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, tuple) else None,
)
def test_wrong_options(tmp_path, model, arguments, wanted):
    refused(graphopt("optimize", model, "-o", tmp_path / "out", *FAST, *arguments), *wanted)


def sample(count: int = 8) -> np.ndarray:
    return np.zeros((count, 3, 8, 8), np.float32)


@pytest.mark.parametrize(
    ("arrays", "wanted"),
    [
        ({"x": np.zeros((8, 3, 9, 8), np.float32)}, "[8, 3, 9, 8]"),
        ({"x": np.where(np.arange(8 * 192).reshape(8, 3, 8, 8) == 700, np.nan, 0).astype(np.float32)}, "NaN"),
        ({"X": sample()}, "'X'"),
        ({"x": sample(), "labels": np.full(8, 5)}, "label 5"),
        ({"x": sample(), "labels": np.zeros(7, int)}, "7 labels for 8 samples"),
        ({"x": sample().astype("U1")}, "x"),
    ],
    ids=["shape", "nan", "name", "label-range", "label-count", "strings"],
)
def test_data_that_does_not_fit(tmp_path, model, arrays, wanted):
    np.savez(tmp_path / "data.npz", **arrays)
    result = graphopt(
        "optimize", model, "-o", tmp_path / "out", "--preset", "int8", "--calib", tmp_path / "data.npz", *FAST
    )
    refused(result, wanted)


def test_drawing_more_than_there_is(tmp_path, model):
    data = save_labelled_data(tmp_path / "data.npz", model, 8)
    result = graphopt(
        "optimize", model, "-o", tmp_path / "out", "--preset", "int8", "--calib", data, "--calib-samples", 9, *FAST
    )
    refused(result, "9", "8")


def test_output_below_a_file(tmp_path, model):
    refused(graphopt("optimize", model, "-o", model / "out", *FAST), "cannot write")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_output(tmp_path, model):
    (tmp_path / "closed").mkdir(mode=0o555)
    refused(graphopt("optimize", model, "-o", tmp_path / "closed" / "out", *FAST), "cannot write")


def test_running_what_is_no_artifact(tmp_path):
    np.savez(tmp_path / "in.npz", x=sample(1))
    (tmp_path / "folder").mkdir()
    output = ("--input", tmp_path / "in.npz", "-o", tmp_path / "out.npz")
    refused(graphopt("run", tmp_path / "nothing", *output), "no such artifact folder")
    refused(graphopt("run", tmp_path / "folder", *output), "not an artifact")
    assert not (tmp_path / "out.npz").exists()


def test_explain_an_unknown_pass():
    refused(graphopt("explain", "fold-batchnorm"), "did you mean 'fold-batch-norm'?")


def test_compare_with_a_wrong_bound(model):
    refused(graphopt("compare", model, model, "--max-regression", "fast"), "5%")
