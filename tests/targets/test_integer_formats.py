"""Models that others quantized: QOperator, MatMulInteger, ConvInteger, dynamic quantization, against ONNX Runtime."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from graphopt.targets.relax import pipeline
from tests.targets.integer_models import integer_conv
from tests.targets.oracle import TARGET, compiled, model, node, reference

MOST = 63
"""Of a weight: with larger ones ONNX Runtime's sums of two products saturate where a processor has no VNNI."""
CASES = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def qoperator_model(per_channel: bool) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """What ONNX Runtime's quantizer writes in its QOperator format."""
    rng = np.random.default_rng(4)
    x = rng.uniform(-1, 1, (1, 3, 12, 12)).astype(np.float32)

    def scheme(name, scale, zero):
        return {name + "_s": np.float32(scale), name + "_z": np.uint8(zero)}

    def weights(name, shape):
        scale = rng.uniform(0.005, 0.01, shape[0] if per_channel else ()).astype(np.float32)
        return {name: rng.integers(-MOST, MOST + 1, shape).astype(np.int8), name + "_s": scale,
                name + "_z": np.zeros(scale.shape, np.int8)}  # fmt: skip

    constants = {**scheme("x", 2 / 255, 128), **scheme("a", 0.05, 0), **scheme("b", 0.3, 120), **scheme("c", 0.3, 90),
                 **scheme("g", 0.1, 100), **scheme("y", 0.2, 128), **weights("w1", (16, 3, 3, 3)),
                 **weights("w2", (16, 16, 3, 3)), **scheme("k", 0.31, 95),
                 "b1": rng.integers(-500, 500, 16).astype(np.int32)}  # fmt: skip
    matrix = weights("w3", (32, 10))
    if per_channel:
        matrix |= {"w3_s": rng.uniform(0.005, 0.01, 10).astype(np.float32), "w3_z": np.zeros(10, np.int8)}
    constants |= matrix
    s = ["_s", "_z"]
    m = "com.microsoft"
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "x_s", "x_z"], ["xq"]),
        helper.make_node("QLinearConv", ["xq", *("x" + i for i in s), "w1", *("w1" + i for i in s),
                                         *("a" + i for i in s), "b1"], ["aq"], pads=[1, 1, 1, 1]),
        helper.make_node("QLinearConv", ["aq", *("a" + i for i in s), "w2", *("w2" + i for i in s),
                                         *("b" + i for i in s)], ["bq"], pads=[1, 1, 1, 1]),
        helper.make_node("QLinearAdd", ["bq", *("b" + i for i in s), "aq", *("a" + i for i in s),
                                        *("c" + i for i in s)], ["cq"], domain=m),
        helper.make_node("QLinearConcat", ["k_s", "k_z", "cq", *("c" + i for i in s), "aq", *("a" + i for i in s)],
                         ["kq"], axis=1, domain=m),
        helper.make_node("QLinearGlobalAveragePool", ["kq", *("k" + i for i in s), *("g" + i for i in s)], ["gq"],
                         domain=m),
        helper.make_node("Flatten", ["gq"], ["fq"]),
        helper.make_node("QLinearMatMul", ["fq", *("g" + i for i in s), "w3", *("w3" + i for i in s),
                                           *("y" + i for i in s)], ["yq"]),
        helper.make_node("DequantizeLinear", ["yq", "y_s", "y_z"], ["y"]),
    ]  # fmt: skip
    graph = helper.make_graph(
        nodes, "qoperators",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, (1, 10))],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(m, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9), {"x": x}


@pytest.mark.parametrize("per_channel", [False, True])
def test_qoperator_models(per_channel):
    proto, feeds = qoperator_model(per_channel)
    made = ir.from_proto(proto)
    names = list(pipeline.prim_funcs(TARGET.lower(made).module))
    assert sum("dequantize" in name for name in names) == 1, names  # the last node
    assert not any("matmul" in name for name in names), names
    found, wanted = compiled(made, feeds)["y"], reference(made, feeds)["y"]
    assert np.abs(found - wanted).max() <= 2 * 0.2 + 1e-6  # two quanta of the last of six roundings


def test_the_model_that_is_compiled_is_not_changed():
    proto, _ = qoperator_model(False)
    made = ir.from_proto(proto)
    before = ir.to_proto(made).SerializeToString()
    TARGET.lower(made)
    assert ir.to_proto(made).SerializeToString() == before


@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
@pytest.mark.parametrize("per_column", [False, True])
def test_matmul_integer(dtype, per_column):
    rng = np.random.default_rng(8)
    info = np.iinfo(dtype)
    x = rng.integers(info.min, info.max + 1, (2, 5, 37)).astype(dtype)
    w = rng.integers(0, 128, (37, 20)).astype(np.uint8)
    z = np.array(info.min + 77, dtype)
    weight_zero = rng.integers(0, 100, 20 if per_column else ()).astype(np.uint8)
    made = model([node("MatMulInteger", ["x", "w", "z", "wz"], ["y"])], {"x": x, "z": z}, ["y"],
                 {"w": w, "wz": weight_zero})  # fmt: skip
    wanted = (x.astype(int) - int(z)) @ (w.astype(int) - weight_zero.astype(int))
    np.testing.assert_array_equal(compiled(made, {"x": x, "z": z})["y"], wanted.astype(np.int32))


@pytest.mark.parametrize("group", [1, 3])
def test_conv_integer(group):
    rng = np.random.default_rng(9)
    x, z = rng.integers(0, 256, (2, 6, 7, 8)).astype(np.uint8), np.array(93, np.uint8)
    w = rng.integers(-100, 100, (9, 6 // group, 3, 2)).astype(np.int8)
    window = {"pads": [1, 0, 2, 1], "strides": [2, 1], "group": group}
    made = model([node("ConvInteger", ["x", "w", "z"], ["y"], **window)], {"x": x, "z": z}, ["y"], {"w": w})
    wanted = integer_conv(x, w, 93, pads=(1, 0, 2, 1), strides=(2, 1), group=group)
    np.testing.assert_array_equal(compiled(made, {"x": x, "z": z})["y"], wanted.astype(np.int32))


def test_dynamic_quantization():
    """What ONNX Runtime's quantize_dynamic writes for a MatMul."""
    rng = np.random.default_rng(10)
    x = rng.standard_normal((3, 64)).astype(np.float32)
    constants = {"w": rng.integers(-MOST, MOST + 1, (64, 32)).astype(np.int8), "ws": np.float32(0.02),
                 "b": rng.standard_normal(32).astype(np.float32)}  # fmt: skip
    nodes = [
        node("DynamicQuantizeLinear", ["x"], ["xq", "xs", "xz"]),
        node("MatMulInteger", ["xq", "w", "xz"], ["sums"]),
        node("Cast", ["sums"], ["real"], to=onnx.TensorProto.FLOAT),
        node("Mul", ["xs", "ws"], ["scale"]),
        node("Mul", ["real", "scale"], ["scaled"]),
        node("Add", ["scaled", "b"], ["y"]),
    ]
    made = model(nodes, {"x": x}, ["y"], constants)
    found, wanted = compiled(made, {"x": x})["y"], reference(made, {"x": x})["y"]
    # one byte may be rounded the other way: a quantum of x times a weight, in each sum
    assert np.abs(found - wanted).max() <= 2 * 6 / 255 * 1.27 + 1e-4


@CASES
@given(
    seed=st.integers(0, 999),
    channels=st.sampled_from([1, 5, 16, 40]),
    size=st.tuples(st.integers(1, 14), st.integers(1, 14)),
    zero=st.sampled_from([0, 7, 128]),
    op=st.sampled_from(["GlobalAveragePool", "ReduceMean", "ReduceSum"]),
)
def test_a_mean_of_bytes_that_is_an_output_is_divided(seed, channels, size, zero, op):
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 256, (1, channels, *size)).astype(np.uint8)
    scale = np.float32(rng.uniform(0.001, 1))
    attributes: dict[str, object] = {} if op == "GlobalAveragePool" else {"keepdims": 1}
    inputs, constants = ["xd"], {"s": scale, "z": np.uint8(zero)}
    if op == "ReduceSum":
        inputs, constants["axes"] = ["xd", "axes"], np.array([2, 3])
    elif op == "ReduceMean":
        attributes["axes"] = [2, 3]
    nodes = [node("DequantizeLinear", ["x", "s", "z"], ["xd"]), node(op, inputs, ["y"], **attributes)]
    found = compiled(model(nodes, {"x": x}, ["y"], constants), {"x": x}, TARGET)["y"]
    wanted = scale.astype(np.float64) * (x.astype(np.float64) - zero).sum(axis=(2, 3), keepdims=True)
    wanted = wanted if op == "ReduceSum" else wanted / (size[0] * size[1])
    # Sums of bytes are exact; the factor and its product with the sum round, a sum in float rounds at each addition.
    terms = np.abs(x.astype(np.float64) - zero).sum(axis=(2, 3), keepdims=True) * float(scale)
    terms = terms if op == "ReduceSum" else terms / (size[0] * size[1])
    assert (np.abs(found - wanted) <= (4 + size[0] * size[1]) * 2.0**-24 * terms).all()
