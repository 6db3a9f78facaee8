"""Constants that a kernel wants in another form are stored so when the model is built."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from graphopt.errors import TargetError
from graphopt.targets import schedules
from graphopt.targets.relax import pipeline
from graphopt.targets.schedules.workload import Workload
from tests.targets.oracle import TARGET, loaded, model, node, uniform


def _two_convolutions():
    x, w, v = uniform(1, 1, 16, 6, 6), uniform(2, 16, 16, 3, 3), uniform(3, 16, 16, 3, 3)
    nodes = [
        node("Conv", ["x", "w"], ["a"], pads=[1, 1, 1, 1]),
        node("Conv", ["a", "v"], ["y"], pads=[1, 1, 1, 1]),
    ]
    return model(nodes, {"x": x}, ["y"], {"w": w, "v": v}), x


def _run(module, x):
    import tvm

    return loaded(module, TARGET)["main"](tvm.runtime.tensor(x)).numpy()


def _kernels(lowered, repack):
    found = {}
    for name, func in pipeline.prim_funcs(lowered.module).items():
        workload = Workload(func.with_attr("global_symbol", "main"), TARGET.machine())
        kernel = schedules.schedule(workload, schedules.choices(workload)[0])
        found[name] = dataclasses.replace(kernel, repack=repack) if "conv2d" in workload.blocks else kernel
    return found


def test_constants_are_repacked_at_every_call():
    """One kernel serves both convolutions; each weight is doubled, so the result is four times as large."""
    made, x = _two_convolutions()
    lowered = TARGET.lower(made)
    plain = _run(pipeline.with_kernels(lowered.module, _kernels(lowered, {})), x)
    doubled = _run(pipeline.with_kernels(lowered.module, _kernels(lowered, {1: lambda weight: 2 * weight})), x)
    np.testing.assert_array_equal(doubled, 4 * plain)


def test_an_argument_that_is_no_constant_is_refused():
    made, _ = _two_convolutions()
    lowered = TARGET.lower(made)
    with pytest.raises(TargetError, match="argument 0 must be a constant"):
        pipeline.with_kernels(lowered.module, _kernels(lowered, {0: lambda data: data}))
