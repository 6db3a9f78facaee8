"""The whole line on a small model: passes, verification, TVM, measurement, artifact, report."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

import graphopt
from graphopt.errors import ArtifactError, DataError
from graphopt.runtime.artifact import MANIFEST
from tests.models import save_labelled_data, save_small_cnn

FAST = {"tune_seconds": 0.0, "measure_seconds": 0.5, "threads": 1}


def reference(model: Path, feeds: dict[str, np.ndarray]) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, feeds)[0])


@pytest.fixture
def model(tmp_path) -> Path:
    return save_small_cnn(tmp_path)


@pytest.fixture
def data(tmp_path, model) -> Path:
    return save_labelled_data(tmp_path / "data.npz", model, count=200)


def noise(batch: int = 1, seed: int = 5) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(seed).standard_normal((batch, 3, 8, 8)).astype(np.float32)}


@pytest.mark.parametrize("engine", ["tvm", "onnxruntime"])
def test_the_artifact_computes_what_the_model_computes(tmp_path, model, engine):
    result = graphopt.optimize(model, tmp_path / "out", engine=engine, **FAST)
    artifact = graphopt.load(tmp_path / "out", threads=1)
    for batch in (1, 4):  # compiled for one; other batches go to ONNX Runtime
        wanted = reference(model, noise(batch))
        np.testing.assert_allclose(artifact.run(noise(batch))["y"], wanted, rtol=0, atol=1e-5 * abs(wanted).max())
        written = reference(tmp_path / "out" / "model.onnx", noise(batch))
        np.testing.assert_allclose(written, wanted, rtol=0, atol=1e-5 * abs(wanted).max())
    assert result.report.choice is not None
    assert {c.engine for c in result.report.candidates} == {"onnxruntime", engine}
    assert "BatchNormalization" not in result.report.variants[0].operators


def test_what_is_written(tmp_path, model):
    graphopt.optimize(model, tmp_path / "out", **FAST)
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert {MANIFEST, "model.onnx", "report.json", "report.html", "recipe.toml", "latency.json"} <= names
    onnx.checker.check_model(str(tmp_path / "out" / "model.onnx"), full_check=True)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["schema"] == 1
    measured = [c for c in report["candidates"] if c["status"] == "measured"]
    assert all(len(c["latency"]["samples_s"]) >= 5 for c in measured)
    assert report["choice"]["candidate"] in {c["name"] for c in measured}


def test_int8_keeps_the_bound_and_says_what_it_cost(tmp_path, model, data):
    result = graphopt.optimize(
        model, tmp_path / "out", preset="int8", calib=data, calib_samples=100, max_drop=5.0, **FAST
    )
    final = result.report.variant("final")
    assert result.report.evaluation is not None
    assert result.report.evaluation.samples == 100  # what was not drawn for calibration
    assert final.accuracy is not None
    assert final.accuracy["metric"] == "top1"
    assert final.drop is not None
    assert final.drop <= 5.0
    assert result.report.accuracy_met
    assert final.operators["QuantizeLinear"] > 0
    assert final.layer_snr_db


def test_layers_go_back_to_float_until_the_bound_holds(tmp_path, model, data):
    """Ranges calibrated on outliers ruin every layer: with no loss allowed, layers must go back, and are named."""
    arrays = dict(np.load(data))
    arrays["x"] = np.concatenate([arrays["x"][:-1], 300 * arrays["x"][-1:]])
    np.savez(tmp_path / "outliers.npz", **arrays)
    result = graphopt.optimize(
        model, tmp_path / "out", preset="int8", calib=tmp_path / "outliers.npz", eval=data, max_drop=1.0, **FAST
    )
    final = result.report.variant("final")
    assert final.plain_drop is not None
    assert final.plain_drop > 1.0
    assert final.returned_to_float
    assert result.report.choice is not None
    chosen = result.report.chosen()
    assert chosen is not None
    assert chosen.accuracy is not None
    assert chosen.accuracy["value"] >= 99.0


def test_random_calibration_is_allowed_and_loudly_marked(tmp_path, model):
    result = graphopt.optimize(model, tmp_path / "out", preset="int8", calib="random", **FAST)
    assert any("RANDOM" in w for w in result.report.warnings)
    assert "RANDOM" in (tmp_path / "out" / "report.html").read_text()


def test_one_seed_gives_identical_bytes_and_the_recipe_replays_the_run(tmp_path, model, data):
    options = {"preset": "int8", "calib": data, "calib_samples": 64, "engine": "onnxruntime", "seed": 3}
    first = graphopt.optimize(model, tmp_path / "one", **options, **FAST)
    again = graphopt.optimize(model, tmp_path / "two", **options, **FAST)
    for name in ("exact", "final"):
        assert first.report.variant(name) == again.report.variant(name)
    replay = [sys.executable, "-m", "graphopt.cli", "optimize", "--config", str(tmp_path / "one" / "recipe.toml")]
    subprocess.run([*replay, "-o", str(tmp_path / "three"), "-q"], check=True, capture_output=True)
    chosen = {}
    for name in ("one", "two", "three"):
        manifest = json.loads((tmp_path / name / MANIFEST).read_text())
        chosen.setdefault(manifest["variant"], set()).add((tmp_path / name / "model.onnx").read_bytes())
    assert all(len(contents) == 1 for contents in chosen.values())


def unsupported(path: Path) -> Path:
    """A model with an operator that the compiler lacks."""
    nodes = [
        helper.make_node("Relu", ["x"], ["r"], "relu"),
        helper.make_node("Det", ["r"], ["y"], "determinant"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N"])],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def test_an_operator_that_cannot_be_compiled_is_named_and_the_model_stays_on_onnxruntime(tmp_path):
    result = graphopt.optimize(unsupported(tmp_path / "det.onnx"), tmp_path / "out", **FAST)
    compiled = next(c for c in result.report.candidates if c.engine == "tvm")
    assert compiled.status == "unavailable"
    assert "Det" in compiled.reason
    assert "determinant" in compiled.reason
    x = np.random.default_rng(0).standard_normal((1, 3, 3)).astype(np.float32)
    artifact = graphopt.load(tmp_path / "out")
    assert artifact.engine == "onnxruntime"
    np.testing.assert_allclose(artifact.run({"x": x})["y"], np.linalg.det(np.maximum(x, 0)), rtol=1e-4, atol=1e-5)


def test_an_artifact_says_what_is_wrong_with_its_feeds(tmp_path, model):
    graphopt.optimize(model, tmp_path / "out", **FAST)
    artifact = graphopt.load(tmp_path / "out")
    with pytest.raises(DataError, match="'x' is missing"):
        artifact.run({})
    with pytest.raises(DataError, match="no input 'X'"):
        artifact.run({"X": noise()["x"]})
    with pytest.raises(DataError, match="float64"):
        artifact.run({"x": noise()["x"].astype(np.float64)})
    with pytest.raises(DataError, match="shape"):
        artifact.run({"x": noise()["x"][:, :2]})


@pytest.mark.parametrize("damage", ["truncate", "remove", "change"])
def test_a_damaged_artifact_is_told_at_load(tmp_path, model, damage):
    graphopt.optimize(model, tmp_path / "out", **FAST)
    file = tmp_path / "out" / "model.onnx"
    content = file.read_bytes()
    if damage == "remove":
        file.unlink()
    else:
        file.write_bytes(content[:100] if damage == "truncate" else content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ArtifactError, match=r"model\.onnx"):
        graphopt.load(tmp_path / "out")


def test_a_bound_that_cannot_be_met_exits_3_and_delivers_what_keeps_it(tmp_path, model, data):
    arrays = dict(np.load(data))
    arrays["x"] = 1e4 * arrays["x"]  # nothing real survives these ranges
    np.savez(tmp_path / "wrong.npz", **arrays)
    done = subprocess.run(
        [sys.executable, "-m", "graphopt.cli", "optimize", str(model), "-o", str(tmp_path / "out"), "--passes",
         "simplify,fold-batch-norm,lose-everything", "--calib", str(data), "--tune-seconds", "0",
         "--measure-seconds", "0.5", "--threads", "1", "-q"],
        capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(_ruinous(tmp_path / "site"))},
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    assert "MISSED" in done.stdout
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert manifest["variant"] in ("exact", "input")


def _ruinous(site: Path) -> Path:
    """A package with a lossy pass that destroys the model and has nothing to take back."""
    site.mkdir()
    (site / "ruin.py").write_text(
        "import graphopt, numpy, onnx_ir\n"
        "class LoseEverything(graphopt.Pass):\n"
        "    fidelity = graphopt.Fidelity.LOSSY\n"
        "    def run(self, model, context):\n"
        "        for value in model.graph.initializers.values():\n"
        "            array = value.const_value.numpy()\n"
        "            if array.ndim > 1:\n"
        "                value.const_value = onnx_ir.tensor(-array, name=value.name)\n"
        "        return graphopt.PassResult(model, 1)\n"
    )
    info = site / "ruin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: ruin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[graphopt.passes]\nlose-everything = ruin:LoseEverything\n")
    return site


def test_interrupting_the_search_leaves_nothing_but_the_database(tmp_path, model):
    command = [sys.executable, "-m", "graphopt.cli", "optimize", str(model), "-o", str(tmp_path / "out")]
    process = subprocess.Popen(
        [*command, "--tune-seconds", "300", "--threads", "1"], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    database = Path(os.environ["GRAPHOPT_CACHE"])
    deadline = time.monotonic() + 120
    while not list(database.glob("*.jsonl")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    if process.returncode == 0:
        pytest.skip("the search was over before it could be interrupted")
    assert process.returncode == 130, stderr
    assert "interrupted" in stderr.splitlines()[-1]
    assert "Traceback" not in stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx"]


def test_run_bench_compare_and_inspect_on_the_command_line(tmp_path, model):
    def cli(*arguments):
        command = [sys.executable, "-m", "graphopt.cli", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    graphopt.optimize(model, tmp_path / "out", **FAST)
    np.savez(tmp_path / "in.npz", x=noise()["x"])
    assert cli("run", tmp_path / "out", "--input", tmp_path / "in.npz", "-o", tmp_path / "out.npz").returncode == 0
    np.testing.assert_allclose(np.load(tmp_path / "out.npz")["y"], reference(model, noise()), rtol=1e-4, atol=1e-5)
    bench = cli("bench", model, tmp_path / "out", "--threads", 1, "--seconds", 1, "--format", "json", "-q")
    assert bench.returncode == 0, bench.stderr
    assert set(json.loads(bench.stdout)["contenders"]) == {"model.onnx", "out"}
    same = cli("compare", model, model, "--threads", 1, "--seconds", 8, "--max-regression", "50%", "-q")
    assert same.returncode in (0, 5), same.stderr  # 5: a very noisy machine cannot tell, but never 4
    inspected = cli("inspect", model, "--against", tmp_path / "out", "--layers")
    assert inspected.returncode == 0
    assert "BatchNormalization" in inspected.stdout
    assert cli("doctor").returncode == 0


@pytest.mark.long
def test_pruned_split_and_quantized_in_one_pipeline(tmp_path):
    """Passes that change shapes and names of layers, before one that layers are returned to float from."""
    digits = Path(__file__).resolve().parent.parent / "examples" / "digits"
    passes = "simplify,fold-batch-norm,prune-channels{ratio=0.2},low-rank-split{portions=1,energy=0.95},quantize-int8"
    result = graphopt.optimize(
        digits / "digits.onnx", tmp_path / "out", passes=passes, calib=digits / "calib.npz", eval=digits / "eval.npz",
        max_drop=20.0, **FAST,
    )  # fmt: skip
    final = result.report.variant("final")
    assert final.parameter_bytes < result.report.variant("exact").parameter_bytes / 4  # fewer, and smaller
    applied = {record.spec.partition("{")[0]: record.applied for record in result.report.passes}
    assert all(applied[name] for name in ("prune-channels", "low-rank-split", "quantize-int8"))
    assert {c.variant: c.status for c in result.report.candidates if c.engine == "onnxruntime"}["final"] == "measured"
