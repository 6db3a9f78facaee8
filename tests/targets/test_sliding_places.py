"""MaxPool with places, MaxUnpool and Col2Im against ONNX Runtime."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.targets.oracle import agree, compiled, model, node, sum_tolerance, uniform

CASES = settings(max_examples=15, deadline=None, derandomize=True)


@CASES
@given(
    size=st.tuples(st.integers(4, 9), st.integers(4, 9)),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    strides=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    pads=st.tuples(*[st.integers(0, 1)] * 4),
    dilation=st.integers(1, 2),
    order=st.integers(0, 1),
    few=st.booleans(),
)
def test_where_the_largest_are(size, kernel, strides, pads, dilation, order, few):
    """With few values there are equal ones, of which the first counts."""
    assume(all(max(pads[a], pads[a + 2]) < kernel[a] for a in range(2)))
    assume(all(size[a] + pads[a] + pads[a + 2] >= (kernel[a] - 1) * dilation + 1 for a in range(2)))
    x = uniform(1, 2, 3, *size)
    x = np.round(x * 2) if few else x
    window = {"kernel_shape": kernel, "strides": strides, "pads": pads, "dilations": (dilation, dilation)}
    made = model([node("MaxPool", ["x"], ["y", "i"], storage_order=order, **window)], {"x": x}, ["y", "i"])
    agree(made, {"x": x}, 0)


@pytest.mark.parametrize("shape", [(2, 3, 9), (1, 2, 5, 6, 4)])
@pytest.mark.parametrize("mode", ["NOTSET", "SAME_UPPER", "SAME_LOWER"])
def test_in_one_and_three_dimensions(shape, mode):
    x = uniform(2, *shape)
    window = {"kernel_shape": (3,) * (len(shape) - 2), "strides": (2,) * (len(shape) - 2), "auto_pad": mode}
    agree(model([node("MaxPool", ["x"], ["y", "i"], **window)], {"x": x}, ["y", "i"]), {"x": x}, 0)


def test_back_to_where_they_were():
    x = uniform(3, 2, 3, 6, 8)
    window = {"kernel_shape": (2, 2), "strides": (2, 2)}
    nodes = [node("MaxPool", ["x"], ["v", "i"], **window), node("MaxUnpool", ["v", "i"], ["y"], **window)]
    agree(model(nodes, {"x": x}, ["y"]), {"x": x}, 0)


def test_places_count_in_the_shape_that_was_pooled():
    """ONNX Runtime counts in `output_shape` instead."""
    v = np.array([[[[1, 2], [3, 4]]]], np.float32)
    feeds = {"v": v, "i": np.array([[[[5, 7], [13, 15]]]], np.int64)}
    unpool = node("MaxUnpool", ["v", "i", "s"], ["y"], kernel_shape=(2, 2), strides=(2, 2))
    kind = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [unpool],
        "unpool",
        [kind("v", onnx.TensorProto.FLOAT, v.shape), kind("i", onnx.TensorProto.INT64, v.shape)],
        [kind("y", onnx.TensorProto.FLOAT, (1, 1, 5, 5))],
        [onnx.numpy_helper.from_array(np.array([1, 1, 5, 5], np.int64), "s")],
    )
    made = ir.from_proto(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=10))
    wanted = np.zeros((1, 1, 5, 5), np.float32)
    wanted[0, 0, 1::2, 1::2][:2, :2] = v[0, 0]
    np.testing.assert_array_equal(compiled(made, feeds)["y"], wanted)


@pytest.mark.parametrize(
    "window",
    [{}, {"strides": (2, 1)}, {"pads": (1, 0, 1, 2)}, {"dilations": (1, 2), "pads": (0, 1, 0, 1)}],
)
def test_columns_overlap(window):
    size, kernel = (6, 7), (2, 3)
    strides, dilations = window.get("strides", (1, 1)), window.get("dilations", (1, 1))
    pads = window.get("pads", (0, 0, 0, 0))
    counts = [(size[a] + pads[a] + pads[a + 2] - dilations[a] * (kernel[a] - 1) - 1) // strides[a] + 1 for a in (0, 1)]
    x = uniform(4, 2, 3 * 6, counts[0] * counts[1])
    constants = {"size": np.array(size, np.int64), "kernel": np.array(kernel, np.int64)}
    made = model([node("Col2Im", ["x", "size", "kernel"], ["y"], **window)], {"x": x}, ["y"], constants, 18)
    agree(made, {"x": x}, sum_tolerance(6))
