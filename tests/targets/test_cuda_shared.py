"""Trained networks on GPUs: all compile, small ones are run in the emulator, in every precision."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from graphopt import calibration
from graphopt import model as models
from graphopt.passes.base import Context
from graphopt.pipeline import Pipeline
from graphopt.targets import nvcc
from graphopt.targets.cuda import Cuda
from graphopt.targets.schedules.cuda import floor
from tests.targets import cuda_emulator
from tests.targets.oracle import close, reference
from tests.targets.test_cuda import build, needs_emulator, needs_nvcc
from tests.targets.test_shared_models import QUICK, SLOW, _depth, _feeds

pytestmark = pytest.mark.shared
CNNS = {name: shapes for name, shapes in {**QUICK, **SLOW}.items() if name not in ("stories260k", "magika")}
EPSILON = float(np.finfo(np.float32).eps)
HALF_DB = 40.0
TWICE_DB = 3.02


def snr_db(wanted: dict, found: dict) -> float:
    """The least of the outputs' ratios of signal to noise."""
    ratios = []
    for name, array in wanted.items():
        noise = np.square(array.astype(np.float64) - found[name]).sum()
        ratios.append(10 * np.log10(np.square(array.astype(np.float64)).sum() / max(noise, 1e-30)))
    return min(ratios)


@needs_nvcc
@pytest.mark.long
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("precision", ["float32", "float16"])
@pytest.mark.parametrize("name", CNNS)
def test_compiles(name, precision, arch, shared_model, tmp_path):
    made = models.fix_inputs(models.load(shared_model(name)), CNNS[name])
    target = Cuda(arch=arch, precision=precision)
    lowered = target.lower(made)
    target.tune(lowered, seconds=0, database=tmp_path / "none.jsonl")
    target.build(lowered, tmp_path)
    kernels = json.loads((tmp_path / "engine.json").read_text())["kernels"]
    for kernel, (template, _) in lowered.decisions.items():
        needs = kernels.get(f"{kernel}_kernel")
        if template != floor.NAME and needs is not None:
            assert needs["spill_bytes"] == 0, kernel


def emulated(made, target: Cuda, folder: Path, feeds, monkeypatch):
    monkeypatch.setattr(nvcc, "compile_source", cuda_emulator.compile_source)
    return cuda_emulator.run(build(made, target, folder), feeds, times=2)


@needs_emulator
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.long) for n in ("resnet20_cifar10", "squeezenet1_1")] + ["mnist_cnn"]
)
@pytest.mark.parametrize("precision", ["float32", "float16", "int8"])
def test_computes_what_onnx_runtime_does(name, precision, shared_model, tmp_path, monkeypatch):
    made = models.fix_inputs(models.load(shared_model(name)), CNNS[name])
    feeds, target = _feeds(made), Cuda(arch="sm_80", precision="float32" if precision == "int8" else precision)
    wanted = reference(made, feeds)
    if precision == "int8":
        data = calibration.random_dataset(models.signature(made), 4, 0)
        quantize = Pipeline.parse("simplify,fold-batch-norm,quantize-int8")
        quantized, _ = quantize.run(made, Context(target.capabilities, data=data))
        found = emulated(quantized, target, tmp_path / "built", feeds, monkeypatch)
        assert snr_db(wanted, found) > snr_db(wanted, reference(quantized, feeds)) - TWICE_DB
        return
    found = emulated(made, target, tmp_path / "built", feeds, monkeypatch)
    if precision == "float32":  # see test_shared_models
        close(found, wanted, 8 * (1000 * max(_depth(made), 1)) ** 0.5 * EPSILON)
    else:
        assert snr_db(wanted, found) > HALF_DB
