"""Kernels of bytes are one task whatever their scales and zero points; what changes their loops tells them apart."""

from __future__ import annotations

import numpy as np

from graphopt.targets.relax import pipeline
from graphopt.targets.schedules.workload import Workload
from graphopt.targets.tuning.signature import workload_digest
from tests.targets.integer_models import integer_weight, quantized
from tests.targets.oracle import TARGET, model, node


def digests(zero: int, scale: float, size=(9, 10)) -> dict[str, str]:
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, (1, 16, *size)).astype(np.float32)
    first, constants = quantized("x", scale, zero)
    weight, held = integer_weight("w", rng.uniform(-1, 1, (16, 16, 3, 3)).astype(np.float32))
    middle, more = quantized("a", scale * 3, zero + 1)
    last, most = quantized("t", scale * 5, zero + 2)
    nodes = [
        *first,
        weight,
        node("Conv", ["xd", "wd"], ["c"], pads=[1] * 4),
        node("Sigmoid", ["c"], ["a"]),
        *middle,
        node("Add", ["ad", "xd"], ["t"]),
        *last,
    ]
    made = model(nodes, {"x": x}, ["td"], constants | held | more | most)
    funcs = pipeline.prim_funcs(TARGET.lower(made).module)
    return {
        name: workload_digest(Workload(func.with_attr("global_symbol", "main"), TARGET.machine()))
        for name, func in funcs.items()
    }


def test_scales_and_zero_points_do_not_matter():
    assert digests(5, 0.01) == digests(77, 0.02)


def test_sizes_do():
    one, other = digests(5, 0.01), digests(5, 0.01, (9, 11))
    assert one.keys() == other.keys()
    assert all(one[name] != other[name] for name in one)


def test_whether_there_is_a_zero_point_does():
    assert digests(5, 0.01) != digests(0, 0.01)
