"""The scripts of docs/gpu-checks.md, as far as they go without a GPU: refusals, building, and a run in the emulator."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from graphopt.runtime import gpu
from graphopt.targets import nvcc
from graphopt.targets.cuda import Cuda
from tests.targets import cuda_emulator
from tests.targets.oracle import node, uniform
from tests.targets.test_cuda import needs_emulator, needs_nvcc

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "benchmarks" / "gpu"


def run(script: str, *arguments: str, libraries: Path | None = None, **environment: str):
    paths = {} if libraries is None else {"LD_LIBRARY_PATH": str(libraries)}
    return subprocess.run(
        [sys.executable, str(SCRIPTS / script), *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
        env={**os.environ, **paths, **environment},
    )


def write_small(path: Path, factor: float = 1.0) -> None:
    """A CNN with a dynamic batch; `factor` on its weights."""
    nodes = [
        node("Conv", ["x", "w", "b"], ["c"], pads=[1, 1, 1, 1]), node("Relu", ["c"], ["r"]),
        node("MaxPool", ["r"], ["p"], kernel_shape=[2, 2]), node("GlobalAveragePool", ["p"], ["y"]),
    ]  # fmt: skip
    constants = {"w": uniform(1, 12, 5, 3, 3) * np.float32(factor), "b": uniform(2, 12)}
    ends = (("x", ["batch", 5, 9, 9]), ("y", ["batch", 12, 1, 1]))
    inputs, outputs = ([helper.make_tensor_value_info(name, 1, shape)] for name, shape in ends)
    stored = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "small", inputs, outputs, stored)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), path)


@pytest.fixture
def small(tmp_path) -> Path:
    """A CNN with a dynamic batch."""
    path = tmp_path / "small.onnx"
    write_small(path)
    return path


@pytest.mark.skipif(gpu.missing() is None, reason="this machine has a GPU")
@pytest.mark.parametrize("script", ["numerics.py", "latency.py"])
def test_no_gpu_is_a_sentence(script, small):
    done = run(script, str(small))
    assert done.returncode == 1 and done.stderr.startswith("not run: no NVIDIA driver") and not done.stdout


def test_no_models_is_a_sentence(tmp_path):
    done = run("numerics.py", "--build-only", GRAPHOPT_SHARED=str(tmp_path))
    assert done.returncode == 2 and "GRAPHOPT_SHARED" in done.stderr
    assert run("latency.py", "--build-only").returncode == 2


@needs_nvcc
@pytest.mark.long
def test_everything_is_built_without_a_gpu(small, tmp_path):
    out = tmp_path / "out"
    options = "--build-only", "--target", "cuda{arch=sm_90}", "--out", str(out)
    assert run("latency.py", str(small), "--batches", "1,8", *options).returncode == 0
    done = run("numerics.py", str(small), "--precisions", "fp32,int8", *options)
    assert done.returncode == 0, done.stderr
    built = {path.name for path in out.iterdir() if (path / "engine.json").is_file()}
    assert built == {f"small-{each}-sm_90" for each in ("fp16-1", "fp16-8", "fp32-1", "int8-1")}
    done = run("resources.py", str(small), "--archs", "sm_90", "--precisions", "fp16", "--out", str(out))
    assert done.returncode == 0 and "| small | fp16 | sm_90 |" in done.stdout and "tensor_cores" in done.stdout


@needs_emulator
def test_right_and_wrong_are_told_apart(small, tmp_path, monkeypatch):
    """In the emulator: all precisions are right, and a library of another model is wrong."""
    monkeypatch.setattr(nvcc, "compile_source", cuda_emulator.compile_source)
    spec = importlib.util.spec_from_file_location("gpu_common", SCRIPTS / "common.py")
    assert spec is not None and spec.loader is not None
    common = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_common", common)
    spec.loader.exec_module(common)
    for precision in common.PRECISIONS:
        common.build(small, precision, 1, Cuda(arch="sm_80"), tmp_path)
    folder = cuda_emulator.driver_folder()
    done = run("numerics.py", str(small), "--out", str(tmp_path), libraries=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("| right |") == 3 and "emulated" in (tmp_path / "numerics.md").read_text()
    raced = run("latency.py", str(small), "--out", str(tmp_path), "--batches", "1", "--rounds", "2", libraries=folder)
    assert raced.returncode == 0 and "| small | 1 | graphopt fp16 |" in raced.stdout, raced.stderr
    write_small(small, 1.01)
    done = run("numerics.py", str(small), "--precisions", "fp32", "--out", str(tmp_path), libraries=folder)
    assert done.returncode == 1 and "WRONG" in done.stdout, done.stdout


@needs_emulator
@pytest.mark.long
def test_candidates_are_compared_and_recorded(small, tmp_path):
    script = Path(cuda_emulator.__file__).parent / "sweep.py"
    arguments = [str(small), "--first", "1", "--others", "3", "--jobs", "2", "--out", str(tmp_path / "sweep")]
    environment = {**os.environ, "LD_LIBRARY_PATH": str(cuda_emulator.driver_folder()), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(script), *arguments], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0 and "1 products" in done.stdout and "WRONG" not in done.stdout, done.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "sweep" / "tiles.json").read_text().splitlines()]
    assert len(rows) == 4 and all(row["us"] > 0 for row in rows)
    assert json.loads((tmp_path / "sweep" / "schedules.jsonl").read_text())["template"] == "tensor_cores"
