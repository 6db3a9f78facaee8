"""The register-tiled loops of depthwise convolution and pooling, every shape of tile, against ONNX Runtime.

Operands are numbers that bfloat16 holds, so that in bfloat16 the only further error is the rounding of what is stored.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from graphopt import capabilities
from graphopt.targets.cpu import Cpu
from graphopt.targets.relax import pipeline
from graphopt.targets.schedules import depthwise
from graphopt.targets.schedules.register_tiles import Axis
from graphopt.targets.schedules.workload import Workload
from tests.targets.oracle import EPSILON, compiled, model, node, reference, uniform

UNIT = 2.0**-8
"""Largest relative error of rounding to bfloat16."""
TARGETS = [Cpu(threads=1), Cpu(threads=2)]
if capabilities.X86_FEATURES["x86-64-v3"] <= capabilities.host_features():
    TARGETS.append(Cpu(mcpu="x86-64-v3", threads=1))
if {"avx512_bf16", "amx_bf16"} & capabilities.host_features():
    TARGETS.append(Cpu(threads=1, precision="bfloat16"))
CASES = settings(max_examples=30, deadline=None, derandomize=True)
pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))


def exact(seed: int, *shape: int) -> np.ndarray:
    return uniform(seed, *shape).astype(ml_dtypes.bfloat16).astype(np.float32)


def windowed(made, target: Cpu) -> list[tuple[str, list]]:
    """The kernels that the template takes, with what it offers for them."""
    funcs = pipeline.prim_funcs(target.lower(made).module)
    found = {
        n: depthwise.match(Workload(f.with_attr("global_symbol", "main"), target.machine())) for n, f in funcs.items()
    }
    return [(name, space) for name, space in found.items() if space]


def check(made, feeds, target: Cpu, decisions, terms: int) -> None:
    """Sums of `terms` products, and two roundings (of the output, and of its part in a residual) in bfloat16."""
    found, wanted = compiled(made, feeds, target, decisions)["y"], reference(made, feeds)["y"]
    slack = 8 * EPSILON * max(terms, 4) * np.maximum(1, np.abs(wanted))
    if target.precision == "bfloat16":
        slack = slack + 2 * UNIT * np.abs(wanted)
    assert found.shape == wanted.shape
    assert (np.abs(found - wanted) <= slack).all(), float((np.abs(found - wanted) - slack).max())


@CASES
@given(
    op=st.sampled_from(["Conv", "Conv", "MaxPool", "AveragePool"]),
    batch=st.integers(1, 4),
    channels=st.sampled_from([2, 5, 8, 16, 19, 32, 33, 58, 64]),
    size=st.tuples(st.integers(3, 17), st.integers(3, 17)),
    kernel=st.sampled_from([(1, 1), (3, 3), (3, 3), (5, 5), (1, 3), (3, 2), (2, 2), (7, 7), (4, 1)]),
    strides=pairs,
    dilations=pairs,
    pads=st.tuples(*[st.integers(0, 3)] * 4),
    residual=st.booleans(),
    target=st.sampled_from(TARGETS),
    data=st.data(),
)
def test_every_tile_is_right(op, batch, channels, size, kernel, strides, dilations, pads, residual, target, data):
    if op != "Conv":  # ONNX wants at least one position of the picture in each window
        pads = tuple(min(p, (kernel[i % 2] - 1) // 2) for i, p in enumerate(pads))
    if op == "AveragePool":
        dilations = (1, 1)
    reach = [(kernel[a] - 1) * dilations[a] + 1 for a in range(2)]
    assume(all(size[a] + pads[a] + pads[a + 2] >= reach[a] for a in range(2)))
    x, constants = exact(1, batch, channels, *size), {}
    if op == "Conv":
        constants = {"w": exact(2, channels, 1, *kernel), "b": exact(3, channels)}
        window = {"group": channels, "strides": strides, "dilations": dilations, "pads": pads}
        nodes = [node("Conv", ["x", "w", "b"], ["a"], **window)]
    else:
        window = {"kernel_shape": kernel, "strides": strides, "pads": pads}
        window |= {"dilations": dilations} if op == "MaxPool" else {"count_include_pad": data.draw(st.integers(0, 1))}
        nodes = [node(op, ["x"], ["a"], **window)]
    nodes.append(node("Add", ["a", "a"], ["c"]) if residual else node("Abs", ["a"], ["c"]))
    nodes.append(node("Relu", ["c"], ["y"]))
    made = model(nodes, {"x": x}, ["y"], constants, opset=19)
    kernels = windowed(made, target)
    assert kernels
    decisions = {name: (depthwise.NAME, data.draw(st.sampled_from(space))) for name, space in kernels}
    check(made, {"x": x}, target, decisions, kernel[0] * kernel[1])


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (5, 2)])
def test_tiles_of_any_size(kernel, stride, target):
    """Sizes the template would not offer: one output, more than the picture has, rests of every kind."""
    from graphopt.targets.schedules.depthwise_loops import DepthwiseLoops

    x = exact(1, 1, 20, 11, 13)
    constants = {"w": exact(2, 20, 1, kernel, kernel)}
    window = {"group": 20, "strides": [stride] * 2, "pads": [kernel // 2] * 4}
    made = model([node("Conv", ["x", "w"], ["y"], **window)], {"x": x}, ["y"], constants)
    ((name, _),) = windowed(made, target)
    for tile in ({"rows": 1, "columns": 1}, {"rows": 4, "columns": 3}, {"rows": 2, "columns": 5}):
        check(made, {"x": x}, target, {name: (depthwise.NAME, tile)}, kernel * kernel)
    func = pipeline.prim_funcs(target.lower(made).module)[name].with_attr("global_symbol", "main")
    assert DepthwiseLoops(Workload(func, target.machine())).window.columns == Axis(
        extent=(13 - 1) // stride + 1, length=13, kernel=kernel, stride=stride, dilation=1, pad=kernel // 2
    )


def test_a_window_after_something_else_is_left_to_others():
    """What is computed before the window, in one kernel with it, is not a plain copy of padding."""
    x = exact(1, 1, 16, 9, 9)
    made = model([node("GlobalAveragePool", ["x"], ["y"])], {"x": x}, ["y"])
    assert windowed(made, TARGETS[0]) == []
