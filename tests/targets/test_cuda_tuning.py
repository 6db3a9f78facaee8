"""Choosing GPU kernels by measurement: on the emulated driver, whose times mean nothing but are times."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from graphopt import model as models
from graphopt.errors import TargetError
from graphopt.runtime import gpu
from graphopt.targets import nvcc
from graphopt.targets.cuda import Cuda
from graphopt.targets.tuning.database import Database
from tests.targets import cuda_emulator
from tests.targets.oracle import close, model, node, reference, uniform
from tests.targets.test_cuda import HALF, needs_emulator

ROOT = Path(__file__).resolve().parent.parent.parent


def small():
    x = uniform(0, 1, 16, 10, 10)
    nodes = [
        node("Conv", ["x", "w", "b"], ["c"], pads=[1, 1, 1, 1]), node("Relu", ["c"], ["r"]),
        node("Conv", ["r", "w", "b"], ["d"], pads=[1, 1, 1, 1]), node("Relu", ["d"], ["s"]),
        node("MaxPool", ["s"], ["y"], kernel_shape=[2, 2]),
    ]  # fmt: skip
    return model(nodes, {"x": x}, ["y"], {"w": uniform(1, 16, 16, 3, 3), "b": uniform(2, 16)}), {"x": x}


def tuned(folder: Path, path: Path, seconds: float) -> dict:
    script = Path(cuda_emulator.__file__).parent / "tune.py"
    arguments = [str(path), str(folder), str(folder / "db.jsonl"), "cuda{arch=sm_80,precision=fp16}", str(seconds)]
    environment = {**os.environ, "LD_LIBRARY_PATH": str(cuda_emulator.driver_folder()), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(script), *arguments], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@needs_emulator
def test_the_fastest_is_recorded_and_found_again(tmp_path):
    made, feeds = small()
    path = tmp_path / "m.onnx"
    path.write_bytes(models.to_bytes(made))
    first = tuned(tmp_path, path, 300)
    records = dict(Database(tmp_path / "db.jsonl", shipped=None))
    conv = [row for row in first["rows"] if row["template"] == "tensor_cores"]
    assert len(conv) == 1 and conv[0]["calls"] == 2 and conv[0]["time_us"] > 0 and conv[0]["trials"] >= 4
    assert len(records) == 2 and {key.isa for key in records} == {"sm_80"} and {key.threads for key in records} == {80}
    again = tuned(tmp_path, path, 300)
    assert again["trials"] == 0 and again["known"] == 2
    assert [(r["template"], r["decision"]) for r in again["rows"]] == [
        (r["template"], r["decision"]) for r in first["rows"]
    ]
    close(cuda_emulator.run(tmp_path, feeds), reference(made, feeds), 8 * HALF)


@pytest.mark.skipif(gpu.missing() is None, reason="this machine has a GPU")
def test_nothing_is_measured_without_a_gpu(tmp_path):
    target = Cuda(arch="sm_80", precision="fp16")
    with pytest.raises(TargetError, match="cannot be tuned here: no NVIDIA driver"):
        target.tune(target.lower(small()[0]), seconds=5, database=tmp_path / "db.jsonl")
    assert not (tmp_path / "db.jsonl").exists()


def test_kernels_that_spill_get_their_next_decision(tmp_path, monkeypatch):
    """A compiler that says each first choice spills: the second one is built."""
    target = Cuda(arch="sm_80", precision="fp16", host="x86_64")
    lowered = target.lower(small()[0])
    target.tune(lowered, seconds=0, database=tmp_path / "db.jsonl")
    before = dict(lowered.decisions)
    compilations = []

    def compile_source(source: str, arch: str, jobs: int) -> nvcc.Image:
        compilations.append(source)
        names = [f"{name}_kernel" for name in lowered.decisions]
        return nvcc.Image("fatbin", b"code", {n: nvcc.Resources(64, 0, 4 * (len(compilations) == 1), 0) for n in names})

    monkeypatch.setattr(nvcc, "compile_source", compile_source)
    target.build(lowered, tmp_path)
    assert len(compilations) == 2
    kept = {name for name, choice in lowered.decisions.items() if choice == before[name]}
    assert kept and all(before[name][0] == "floor" for name in kept)
