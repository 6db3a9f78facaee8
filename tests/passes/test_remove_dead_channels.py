"""`remove-dead-channels` against ONNX Runtime without optimisations, on networks with channels killed at random."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from graphopt import graph as g
from graphopt import model as models
from graphopt.passes.base import Context, Fidelity
from graphopt.passes.channels.bounds import channel_bounds
from graphopt.passes.channels.dependency import ChannelGraph
from graphopt.passes.remove_dead_channels import RemoveDeadChannels
from graphopt.pipeline import Pipeline
from graphopt.verify import Reference
from tests.passes.channel_models import networks
from tests.passes.oracle import SHAPES, random_feeds, run

EXAMPLES = settings(max_examples=40, deadline=None)


def remove(model: ir.Model):
    """Run the pass on a copy; the result is valid and equal to rounding."""
    result = RemoveDeadChannels().run(model.clone(), Context())
    models.check(result.model, "the result")
    assert models.signature(result.model) == models.signature(model)
    with tempfile.TemporaryDirectory() as folder:
        samples = [random_feeds(model, {}, seed) for seed in range(2)]
        reference = Reference(model, samples, Path(folder))
        reference.judge_model(result.model, Fidelity.ROUNDING, "remove-dead-channels")
    return result


def kill(model: ir.Model, share: float, seed: int) -> None:
    """Zero weights of whole output channels, scales of BatchNormalization, and turn others negative."""
    rng = np.random.default_rng(seed)
    for node in model.graph:
        if node.op_type not in ("Conv", "Gemm", "BatchNormalization"):
            continue
        value = node.inputs[1]
        array = g.constant_of(value)
        if value is None or array is None:
            continue
        axis = 1 if node.op_type == "Gemm" and not g.attribute(node, "transB", 0) else 0
        array = np.moveaxis(np.array(array), axis, 0)
        array[rng.random(len(array)) < share] = 0
        negative = rng.random(len(array)) < share / 2
        array[negative] = -np.abs(array[negative])
        value.const_value = ir.Tensor(np.ascontiguousarray(np.moveaxis(array, 0, axis)), name=value.name)
        bias = g.input_of(node, 2)
        shift = g.constant_of(bias)
        if bias is not None and shift is not None and rng.random() < 0.7:
            bias.const_value = ir.Tensor(-np.abs(shift) * (rng.random() < 0.5), name=bias.name)


@EXAMPLES
@given(networks(), st.floats(0.1, 0.9), st.integers(0, 2**32 - 1))
def test_the_function_stays(proto, share, seed):
    model = ir.from_proto(proto)
    kill(model, share, seed)
    remove(model)


@EXAMPLES
@given(networks(), st.floats(0.0, 0.9), st.integers(0, 2**32 - 1))
def test_bounds_hold(proto, share, seed):
    """What ONNX Runtime computes lies within the bounds, up to the rounding of constants."""
    model = ir.from_proto(proto)
    kill(model, share, seed)
    channels = ChannelGraph(model)
    bounds = channel_bounds(channels)
    opened = model.clone()
    values = {str(v.name): v for v in bounds}
    outputs = {str(v.name) for v in opened.graph.outputs}
    opened.graph.outputs.extend(
        v for n in opened.graph for v in n.outputs if v.name in values and v.name not in outputs
    )
    names = [str(v.name) for v in opened.graph.outputs if v.name in values]
    for name, array in zip(names, run(opened, random_feeds(model, {}, seed % 1000), names), strict=True):
        low, high = bounds[values[name]]
        axis = channels.carried[values[name]].axis
        rows = np.moveaxis(array, axis, 0).reshape(array.shape[axis], -1).astype(np.float64)
        rounding = 1e-4 * np.abs(np.where(low == high, low, 0.0)) + 1e-30
        assert (rows.min(axis=1) >= low - rounding).all() and (rows.max(axis=1) <= high + rounding).all()


def chain(middle, weights: np.ndarray, bias: np.ndarray, pads: int = 0, kernel: int = 3) -> ir.Model:
    """x f32[1,3,6,6] -> Conv(weights, bias) -> `middle` nodes from a to b -> Conv -> y."""
    rng = np.random.default_rng(5)
    c = len(weights)
    nodes = [
        helper.make_node("Conv", ["x", "w", "bias"], ["a"], "first"),
        *middle,
        helper.make_node("Conv", ["b", "v"], ["y"], "second", pads=[pads] * 4),
    ]
    initializers = {
        "w": weights.astype(np.float32),
        "bias": bias.astype(np.float32),
        "v": rng.standard_normal((4, c, kernel, kernel)).astype(np.float32),
        "w2": rng.standard_normal((c, 3, 1, 1)).astype(np.float32),
        "six": np.float32(6),
        "zero": np.float32(0),
        "scale": np.array([1, 0, 1, 1, 1][:c], np.float32),
        "shift": np.array([1, 0.5, 1, 1, 1][:c], np.float32),
        "ones": np.ones(c, np.float32),
    }
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 6, 6])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(a), n) for n, a in initializers.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto, strict_mode=True))


def node(op: str, *inputs: str, **attributes):
    return helper.make_node(op, [*inputs], ["b"], op.lower(), **attributes)


WEIGHTS = np.random.default_rng(3).standard_normal((5, 3, 1, 1))
WEIGHTS[[1, 3]] = 0


def channels_of(model: ir.Model) -> int:
    array = g.constant_of(next(n for n in model.graph if n.name == "first").inputs[1])
    assert array is not None
    return array.shape[0]


@pytest.mark.parametrize(
    ("middle", "bias", "pads", "left"),
    [
        (node("Relu", "a"), [0, 0, 0, 0, 0], 1, 3),
        (node("Relu", "a"), [1, -2, 1, -1, 1], 1, 3),
        (node("Relu", "a"), [1, 2, 1, -1, 1], 1, 4),
        (node("Relu", "a"), [1, 2, 1, -1, 1], 0, 3),
        (node("Sigmoid", "a"), [0, 0, 0, 0, 0], 0, 5),
        (node("Clip", "a", "zero", "six"), [0, 7, 0, -1, 0], 0, 3),
        (node("Clip", "a", "zero", "six"), [0, 7, 0, -1, 0], 1, 4),
        (node("BatchNormalization", "a", "scale", "shift", "ones", "ones"), [1, 1, 1, 1, 1], 0, 3),
        (node("MaxPool", "a", kernel_shape=[2, 2]), [1, 1, 1, 1, 1], 0, 3),
    ],
)
def test_which_channels_are_dead(middle, bias, pads, left):
    """Two channels have zero weights; a constant other than zero stays where the next layer pads."""
    result = remove(chain([middle], WEIGHTS, np.array(bias, float), pads))
    assert channels_of(result.model) == left
    assert result.applied == 5 - left
    if pads and left == 4:
        (skip,) = result.skipped
        assert skip.node == "second" and "pads" in skip.reason


def test_signs_prove_a_channel_dead():
    """Relu, then a convolution with negative weights and bias, then Relu: always zero."""
    rng = np.random.default_rng(0)
    v = rng.standard_normal((6, 5, 3, 3)).astype(np.float32)
    v[2] = -np.abs(v[2])
    v[4] = -np.abs(v[4])
    model = chain([node("Relu", "a")], np.delete(WEIGHTS, [1, 3], 0)[[0, 1, 2, 0, 1]], np.ones(5), 1)
    graph = model.graph
    second = next(n for n in graph if n.name == "second")
    second.replace_input_with(1, g.add_initializer(graph, "deep", v))
    bias = g.add_initializer(graph, "deep_bias", np.array([1, 1, -1, 1, 1e-3, 1], np.float32))
    old = graph.outputs[0]
    second.resize_inputs(3)
    second.replace_input_with(2, bias)
    old.name, old.shape = "inner", None
    relu = ir.node("Relu", [old], name="relu2")
    third = g.add_initializer(graph, "third", rng.standard_normal((2, 6, 1, 1)).astype(np.float32))
    last = ir.node("Conv", [relu.outputs[0], third], name="third")
    relu.outputs[0].name, last.outputs[0].name = "positive", "y"
    last.outputs[0].type, last.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([1, 2, 6, 6])
    graph.extend([relu, last])
    graph.outputs[0] = last.outputs[0]
    result = remove(model)
    assert result.applied == 1  # the other one's bias is positive: it may live
    weights = g.constant_of(next(n for n in result.model.graph if n.name == "third").inputs[1])
    assert weights is not None and weights.shape == (2, 5, 1, 1)


def test_a_dead_channel_beside_a_live_one_stays():
    """Added to a channel that lives, a dead one cannot be cut."""
    middle = [helper.make_node("Relu", ["x2"], ["r"], "relu"), helper.make_node("Add", ["a", "r"], ["b"], "add")]
    other = helper.make_node("Conv", ["x", "w2"], ["x2"], "other")
    model = chain([other, *middle], WEIGHTS, np.zeros(5))
    assert remove(model).applied == 0


def test_the_last_channel_stays():
    result = remove(chain([node("Relu", "a")], np.zeros((5, 3, 1, 1)), np.zeros(5)))
    assert channels_of(result.model) == 1
    assert any("last channel" in skip.reason for skip in result.skipped)


def test_nothing_to_do():
    model = chain([node("Relu", "a")], np.delete(WEIGHTS, [1, 3], 0)[[0, 1, 2, 0, 1]], np.ones(5))
    before = models.to_bytes(model)
    result = RemoveDeadChannels().run(model, Context())
    assert result.applied == 0 and not result.skipped and models.to_bytes(result.model) == before


@pytest.mark.shared
@pytest.mark.parametrize(("name", "dead"), [("nanodet_m", 106), ("mobilenetv1_075", 14), ("squeezenet1_1", 0)])
def test_trained_networks_have_dead_channels(shared_model, name, dead, tmp_path):
    source, _ = Pipeline.parse("simplify,fold-batch-norm").run(models.load(shared_model(name)), Context())
    result = RemoveDeadChannels().run(source.clone(), Context())
    assert result.applied == dead
    samples = [random_feeds(source, SHAPES[name], seed) for seed in range(2)]
    reference = Reference(source, samples, tmp_path)
    reference.judge_model(result.model, Fidelity.ROUNDING, "remove-dead-channels")
