"""Depthwise, pooling and elementwise kernels for GPUs, on drawn shapes, emulated, against ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graphopt.targets import nvcc
from graphopt.targets.cuda import Cuda
from graphopt.targets.schedules.cuda import elementwise, windows
from tests.targets import cuda_emulator
from tests.targets.oracle import close, model, node, reference, sum_tolerance, uniform
from tests.targets.test_cuda import HALF, needs_emulator


def drawn_model(seed: int):
    """Windows of every kind over one picture: kernels, strides, pads, dilations; and sums of what broadcasts."""
    rng = np.random.default_rng(seed)
    channels = int(rng.integers(2, 40))
    x = uniform(seed, int(rng.integers(1, 3)), channels, 13, 10)
    nodes, constants, outputs = [], {}, []
    for i in range(8):
        kernel = [int(k) for k in rng.integers(1, 5, 2)]
        attributes: dict[str, Any] = {"strides": [int(s) for s in rng.integers(1, 3, 2)], "kernel_shape": kernel}
        attributes["pads"] = [int(rng.integers(0, k)) for k in (*kernel, *kernel)]
        kind = ("Conv", "MaxPool", "AveragePool", "Conv")[i % 4]
        if kind == "Conv":
            constants[f"w{i}"], constants[f"b{i}"] = uniform(i, channels, 1, *kernel), uniform(i + 9, channels)
            attributes.update(group=channels, dilations=[int(d) for d in rng.integers(1, 3, 2)])
            nodes += [node("Conv", ["x", f"w{i}", f"b{i}"], [f"c{i}"], **attributes),
                      node("HardSwish", [f"c{i}"], [f"y{i}"])]  # fmt: skip
        else:
            nodes.append(node(kind, ["x"], [f"y{i}"], **attributes))
        outputs.append(f"y{i}")
    constants["s"] = uniform(77, 1, channels, 1, 1)
    nodes += [node("Mul", ["x", "s"], ["m"]), node("Sigmoid", ["m"], ["g"]), node("Add", ["g", "x"], ["y"])]
    row = uniform(seed, 5, 24)
    constants["r"] = uniform(5, 24)
    nodes += [node("Tanh", ["row"], ["t"]), node("Mul", ["t", "r"], ["e"])]
    return model(nodes, {"x": x, "row": row}, [*outputs, "y", "e"], constants), {"x": x, "row": row}


@needs_emulator
@pytest.mark.parametrize("precision", ["float32", "float16"])
@pytest.mark.parametrize("seed", [0, *(pytest.param(s, marks=pytest.mark.long) for s in (1, 2, 3))])
def test_windows_compute_what_onnx_runtime_does(seed, precision, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(nvcc, "compile_source", cuda_emulator.compile_source)
    made, feeds = drawn_model(seed)
    target = Cuda(arch="sm_80", precision=precision)
    lowered = target.lower(made)
    target.tune(lowered, seconds=0, database=tmp_path / "none")
    assert {windows.NAME, elementwise.NAME} <= {template for template, _ in lowered.decisions.values()}
    target.build(lowered, tmp_path)
    # in float16 the input and the result are rounded, each by eps / 2, and a window adds up at most 16 of the first
    tolerance = sum_tolerance(16) if precision == "float32" else 4 * HALF
    close(cuda_emulator.run(tmp_path, feeds), reference(made, feeds), tolerance)


def test_transpositions_are_not_taken_for_elementwise():
    made, _ = drawn_model(0)
    target = Cuda(arch="sm_80")
    matched = {name: elementwise.match(w) for name, w in target.workloads(target.lower(made)).items()}
    assert all(found is None for name, found in matched.items() if "block_channels" in name)
    assert any(found for found in matched.values())
