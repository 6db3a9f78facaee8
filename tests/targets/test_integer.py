"""Layers that multiply bytes: sums bit for bit, results against ONNX Runtime, on every way to multiply."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from graphopt import capabilities
from graphopt.targets import schedules
from graphopt.targets.cpu import Cpu
from graphopt.targets.relax import pipeline
from graphopt.targets.schedules import dot
from graphopt.targets.schedules.workload import Workload, new_schedule
from tests.targets.oracle import TARGET, compiled, model, node, reference

CASES = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
PROCESSORS = ["cascadelake", "x86-64-v4", "alderlake", "x86-64-v3", "x86-64-v2"]
"""One for each way to multiply: VPDPBUSD of 64 and of 32 bytes, pairs and words of 64, of 32 and of 16 bytes."""


def runnable(mcpu: str) -> Cpu:
    target = Cpu(mcpu=mcpu, threads=1)
    missing = sorted(target.features - capabilities.host_features())
    if missing:
        pytest.skip(f"this processor lacks {', '.join(missing)}, which {mcpu} has")
    return target


def quantized_conv(seed: int, shape, outs, kernel, *, zero: int, weights: int = 127, bias: bool = False, **attributes):
    """x uint8 -> DequantizeLinear -> Conv of int8 weights with scales of 1: its output is the 32-bit sums."""
    rng = np.random.default_rng(seed)
    groups = attributes.get("group", 1)
    x = rng.integers(0, 256, shape).astype(np.uint8)
    w = rng.integers(-weights, weights + 1, (outs, shape[1] // groups, *kernel)).astype(np.int8)
    constants = {"s": np.float32(1), "z": np.uint8(zero), "w": w, "ws": np.ones(outs, np.float32),
                 "wz": np.zeros(outs, np.int8), "b": rng.integers(-9999, 9999, outs).astype(np.int32)}  # fmt: skip
    nodes = [
        node("DequantizeLinear", ["x", "s", "z"], ["xd"]),
        node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], axis=0),
        node("DequantizeLinear", ["b", "ws"], ["bd"], axis=0),
        node("Conv", ["xd", "wd", *(["bd"] if bias else [])], ["y"], **attributes),
    ]
    return nodes, {"x": x}, constants


def integer_conv(x, w, zero: int, *, strides=(1, 1), pads=(0, 0, 0, 0), dilations=(1, 1), group=1) -> np.ndarray:
    """The plain reference: int64 sums, one kernel position at a time."""
    batch, channels, height, width = x.shape
    outs, ins, k_h, k_w = w.shape
    difference = np.zeros((batch, channels, height + pads[0] + pads[2], width + pads[1] + pads[3]), np.int64)
    difference[:, :, pads[0] : pads[0] + height, pads[1] : pads[1] + width] = x.astype(np.int64) - zero
    high = (difference.shape[2] - (k_h - 1) * dilations[0] - 1) // strides[0] + 1
    wide = (difference.shape[3] - (k_w - 1) * dilations[1] - 1) // strides[1] + 1
    total = np.zeros((batch, group, outs // group, high, wide), np.int64)
    kernel = w.astype(np.int64).reshape(group, outs // group, ins, k_h, k_w)
    for i in range(k_h):
        for j in range(k_w):
            y, z = i * dilations[0], j * dilations[1]
            seen = difference[:, :, y : y + (high - 1) * strides[0] + 1 : strides[0],
                              z : z + (wide - 1) * strides[1] + 1 : strides[1]]  # fmt: skip
            grouped = seen.reshape(batch, group, ins, high, wide)
            total += np.einsum("ngchw,goc->ngohw", grouped, kernel[..., i, j])
    return total.reshape(batch, outs, high, wide)


@pytest.mark.parametrize("mcpu", PROCESSORS)
@CASES
@given(
    seed=st.integers(0, 999),
    form=st.sampled_from(["dense", "dense", "depthwise", "grouped"]),
    channels=st.sampled_from([1, 3, 4, 7, 16, 20, 33]),
    outs=st.sampled_from([1, 5, 16, 24, 40]),
    size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    kernel=st.sampled_from([(1, 1), (3, 3), (3, 3), (5, 5), (1, 3), (2, 2)]),
    strides=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    dilations=st.sampled_from([(1, 1), (1, 1), (2, 1)]),
    pads=st.tuples(*[st.integers(0, 2)] * 4),
    zero=st.sampled_from([0, 0, 128, 255, 7]),
    weights=st.sampled_from([64, 127]),
)
def test_sums_are_exact(mcpu, seed, form, channels, outs, size, kernel, strides, dilations, pads, zero, weights):
    """float32 holds sums below 2^24 exactly: with scales of 1 what comes out are the integers."""
    assume(all(size[a] + pads[a] + pads[a + 2] > (kernel[a] - 1) * dilations[a] for a in range(2)))
    groups = {"depthwise": channels, "grouped": 4}.get(form, 1)
    channels = 4 * channels if form == "grouped" else channels
    outs = channels if form == "depthwise" else 4 * outs if form == "grouped" else outs
    window = {"strides": strides, "dilations": dilations, "pads": pads, "group": groups}
    nodes, feeds, constants = quantized_conv(
        seed, (1, channels, *size), outs, kernel, zero=zero, weights=weights, **window
    )
    wanted = integer_conv(feeds["x"], constants["w"], zero, **window)
    assume(255 * np.abs(constants["w"].astype(int)).reshape(outs, -1).sum(axis=1).max() < 2**23)
    found = compiled(model(nodes, feeds, ["y"], constants), feeds, runnable(mcpu))["y"]
    np.testing.assert_array_equal(found, wanted.astype(np.float32))


@pytest.mark.parametrize("mcpu", PROCESSORS)
def test_the_largest_products_do_not_saturate(mcpu):
    """255 * 127 + 255 * 127 passes 16 bits: weights so large must not be multiplied in pairs."""
    nodes, feeds, constants = quantized_conv(0, (1, 16, 4, 4), 16, (1, 1), zero=0)
    feeds["x"][:] = 255
    constants["w"][:8], constants["w"][8:] = 127, -128
    found = compiled(model(nodes, feeds, ["y"], constants), feeds, runnable(mcpu))["y"]
    np.testing.assert_array_equal(found, integer_conv(feeds["x"], constants["w"], 0).astype(np.float32))


def test_which_way_is_taken():
    nodes, feeds, constants = quantized_conv(0, (1, 16, 4, 4), 16, (1, 1), zero=0, weights=64)
    small = model(nodes, feeds, ["y"], constants)
    constants["w"][:] = 127
    large = model(nodes, feeds, ["y"], constants)
    expected = {"cascadelake": ("vnni", "vnni"), "x86-64-v4": ("pairs", "words"), "alderlake": ("vnni", "vnni"),
                "x86-64-v3": ("pairs", "words"), "x86-64-v2": ("pairs", "words")}  # fmt: skip
    for mcpu, ways in expected.items():
        target = Cpu(mcpu=mcpu, threads=1)
        assert tuple(way_of(made, target) for made in (small, large)) == ways, mcpu


def way_of(made: ir.Model, target: Cpu) -> str | None:
    func = next(f for n, f in pipeline.prim_funcs(target.lower(made).module).items() if "conv2d" in n)
    workload = Workload(func.with_attr("global_symbol", "main"), target.machine())
    return dot.way(target.machine(), workload.blocks["conv2d_int8"])


def test_every_decision_computes_the_same():
    nodes, feeds, constants = quantized_conv(3, (1, 48, 9, 10), 72, (3, 3), zero=5, pads=(1, 1, 1, 1), strides=(2, 1))
    made = model(nodes, feeds, ["y"], constants)
    wanted = integer_conv(feeds["x"], constants["w"], 5, pads=(1, 1, 1, 1), strides=(2, 1)).astype(np.float32)
    name, func = next(
        (n, f) for n, f in pipeline.prim_funcs(TARGET.lower(made).module).items() if n.startswith("fused_conv2d")
    )
    choices = schedules.choices(Workload(func.with_attr("global_symbol", "main"), TARGET.machine()))
    assert {choice.template for choice in choices} == {"conv2d_int8"}
    for choice in choices[::3]:
        found = compiled(made, feeds, decisions={name: (choice.template, choice.decision)})["y"]
        np.testing.assert_array_equal(found, wanted)


@CASES
@given(
    seed=st.integers(0, 999),
    rows=st.sampled_from([1, 1, 3, 17]),
    depth=st.sampled_from([1, 3, 16, 50, 129]),
    columns=st.sampled_from([1, 4, 10, 33, 64]),
    zero=st.sampled_from([0, 128, 9]),
    op=st.sampled_from(["MatMul", "Gemm", "Gemm transposed"]),
)
def test_products_of_matrices(seed, rows, depth, columns, zero, op):
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 256, (rows, depth)).astype(np.uint8)
    w = rng.integers(-127, 128, (columns, depth) if "transposed" in op else (depth, columns)).astype(np.int8)
    axis = 0 if "transposed" in op else 1
    constants = {"s": np.float32(1), "z": np.uint8(zero), "w": w, "ws": np.ones(columns, np.float32)}
    nodes = [
        node("DequantizeLinear", ["x", "s", "z"], ["xd"]),
        node("DequantizeLinear", ["w", "ws"], ["wd"], axis=axis),
        node(op.split()[0], ["xd", "wd"], ["y"], **({"transB": 1} if "transposed" in op else {})),
    ]
    made = model(nodes, {"x": x}, ["y"], constants)
    assert any("conv2d" in name for name in pipeline.prim_funcs(TARGET.lower(made).module))
    matrix = w.T if "transposed" in op else w
    wanted = (x.astype(np.int64) - zero) @ matrix.astype(np.int64)
    np.testing.assert_array_equal(compiled(made, {"x": x})["y"], wanted.astype(np.float32))


def quantized(name: str, scale: float, zero: int, dtype=np.uint8) -> tuple[list[onnx.NodeProto], dict]:
    """QuantizeLinear -> DequantizeLinear behind the value `name`; the result is `name`d."""
    s, z = f"{name}_s", f"{name}_z"
    pair = [
        node("QuantizeLinear", [name, s, z], [name + "q"]),
        node("DequantizeLinear", [name + "q", s, z], [name + "d"]),
    ]
    return pair, {s: np.float32(scale), z: np.array(zero, dtype)}


def integer_weight(name: str, array: np.ndarray, axis: int = 0) -> tuple[onnx.NodeProto, dict]:
    """DequantizeLinear of a float array rounded to int8, with one scale an output; the result is `name`d."""
    others = tuple(a for a in range(array.ndim) if a != axis)
    scale = (np.abs(array).max(axis=others) / 127).astype(np.float32)
    along = [1] * array.ndim
    along[axis] = -1
    stored = np.rint(array / scale.reshape(along)).astype(np.int8)
    zero = np.zeros(scale.shape, np.int8)
    made = node("DequantizeLinear", [name, name + "_s", name + "_z"], [name + "d"], axis=axis)
    return made, {name: stored, name + "_s": scale, name + "_z": zero}


def network(seed: int, dtype, zero: int, activation: str) -> tuple[ir.Model, dict[str, np.ndarray]]:
    """conv -> activation -> pool -> (conv, conv) -> add -> concat -> resize -> global pool -> gemm, all quantized."""
    rng = np.random.default_rng(seed)
    x = rng.uniform(-2, 2, (1, 3, 14, 15)).astype(np.float32)
    low = 0 if dtype == np.uint8 else -128
    nodes: list[onnx.NodeProto] = []
    constants: dict[str, np.ndarray] = {}

    def pair(name, scale, point):
        made, held = quantized(name, scale, point, dtype)
        nodes.extend(made)
        constants.update(held)
        return name + "d"

    def layer(op, data, name, shape, out, axis=0, **attributes):
        made, held = integer_weight(name, rng.uniform(-1, 1, shape).astype(np.float32), axis)
        nodes.append(made)
        constants.update(held)
        nodes.append(node(op, [data, name + "d"], [out], **attributes))

    layer("Conv", pair("x", 4 / 255, low + 128), "w1", (24, 3, 3, 3), "c1", pads=[1, 1, 1, 1])
    nodes.append(node(activation, ["c1"], ["r1"]))
    r1 = pair("r1", 0.05, zero + low)
    nodes.append(node("MaxPool", [r1], ["p1"], kernel_shape=[2, 2], strides=[2, 2]))
    p1 = pair("p1", 0.05, zero + low)
    layer("Conv", p1, "w2", (24, 24, 3, 3), "c2", pads=[1, 1, 1, 1])
    c2 = pair("c2", 0.4, low + 120)
    layer("Conv", p1, "w3", (24, 1, 3, 3), "c3", pads=[1, 1, 1, 1], group=24)
    nodes.append(node("Add", ["c3", c2], ["a1"]))
    a1 = pair("a1", 0.4, low + 100)
    nodes.append(node("Concat", [a1, p1], ["k1"], axis=1))
    k1 = pair("k1", 0.41, low + 100)
    constants["sizes"] = np.array([1, 1, 2, 2], np.float32)
    nodes.append(node("Resize", [k1, "", "sizes"], ["u1"], mode="nearest", coordinate_transformation_mode="asymmetric"))
    u1 = pair("u1", 0.41, low + 100)
    nodes.append(node("GlobalAveragePool", [u1], ["g1"]))
    g1 = pair("g1", 0.05, low + 128)
    nodes.append(node("Flatten", [g1], ["f1"]))
    layer("Gemm", "f1", "w4", (10, 48), "y", transB=1)
    return model(nodes, {"x": x}, ["y"], constants), {"x": x}


@pytest.mark.parametrize("activation", ["Relu", "Sigmoid", "HardSwish"])
@pytest.mark.parametrize(("dtype", "zero"), [(np.uint8, 0), (np.uint8, 20), (np.int8, 0)])
def test_a_network_stays_bytes_from_end_to_end(dtype, zero, activation):
    made, feeds = network(1, dtype, zero, activation)
    names = list(pipeline.prim_funcs(TARGET.lower(made).module))
    assert not any("dequantize" in name or "matmul" in name for name in names), names
    found, wanted = compiled(made, feeds)["y"], reference(made, feeds)["y"]
    # A sum at a tie may round either way: a quantum of g1 (0.05) in some channels, times weights of at most 1.
    assert np.abs(found - wanted).max() <= 0.05 * 48 * 0.1


@pytest.mark.parametrize("op", ["Add", "Mul", "LeakyRelu", "Sigmoid", "GlobalAveragePool", "AveragePool", "Clip"])
@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
def test_an_operator_between_bytes_is_within_a_quantum(op, dtype):
    rng = np.random.default_rng(5)
    x, other = (rng.uniform(-3, 3, (1, 20, 6, 7)).astype(np.float32) for _ in range(2))
    low = 0 if dtype == np.uint8 else -128
    nodes, constants = [], {}
    for name, scale, point in (("x", 0.024, 128 + low), ("o", 0.03, 99 + low)):
        made, held = quantized(name, scale, point, dtype)
        nodes += made
        constants |= held
    operands = ["xd", "od"] if op in ("Add", "Mul") else ["xd"]
    attributes = {"kernel_shape": [3, 2], "pads": [1, 0, 1, 1]} if op == "AveragePool" else {}
    if op == "Clip":
        operands += ["least", "most"]
        constants |= {"least": np.float32(-1), "most": np.float32(1.3)}
    nodes.append(node(op, operands, ["y"], **attributes))
    made, held = quantized("y", 0.05, 70 + low, dtype)
    feeds = {"x": x, "o": other}
    built = model([*nodes, *made], feeds, ["yd"], constants | held)
    found, wanted = compiled(built, feeds)["yd"], reference(built, feeds)["yd"]
    assert np.abs(found - wanted).max() <= 0.05 + 1e-6
    assert np.mean(found != wanted) < 0.02  # ties only


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize(("size", "pads"), [((5, 40), (0, 0, 0, 0)), ((6, 23), (1, 2, 1, 0)), ((4, 16), (3, 3, 3, 3))])
@pytest.mark.parametrize("zero", [0, 114, 255])
def test_a_picture_is_quantized_into_pixels(channels, size, pads, zero):
    """The first layer: a wide picture takes the template, a frame of its zero point with it."""
    rng = np.random.default_rng(channels)
    x = (rng.standard_normal((2, channels, *size)) * 2).astype(np.float32)
    made, held = quantized("x", 0.02, zero)
    weight, constants = integer_weight("w", rng.uniform(-1, 1, (8, channels, 3, 3)).astype(np.float32))
    built = model([*made, weight, node("Conv", ["xd", "wd"], ["y"], pads=pads)], {"x": x}, ["y"], held | constants)
    funcs = pipeline.prim_funcs(TARGET.lower(built).module)
    templates = [
        schedules.choices(Workload(func.with_attr("global_symbol", "main"), TARGET.machine()))[0].template
        for name, func in funcs.items()
    ]
    assert "pixels" in templates, list(funcs)
    found, wanted = compiled(built, {"x": x})["y"], reference(built, {"x": x})["y"]
    # where a quotient is within rounding of a tie, a byte may differ by one: a quantum times a weight
    assert np.abs(found - wanted).max() <= 2 * 0.02 + 1e-4
    assert np.mean(np.abs(found - wanted) > 1e-4) < 0.01


def test_bytes_in_and_out():
    """The graph's own inputs and outputs keep their types."""
    rng = np.random.default_rng(2)
    x = rng.integers(-128, 128, (1, 16, 5, 5)).astype(np.int8)
    weight, held = integer_weight("w", rng.uniform(-1, 1, (16, 16, 1, 1)).astype(np.float32))
    constants = {"s": np.float32(0.05), "z": np.int8(3), "t": np.float32(0.2), **held}
    nodes = [
        node("DequantizeLinear", ["x", "s", "z"], ["xd"]),
        weight,
        node("Conv", ["xd", "wd"], ["c"]),
        node("QuantizeLinear", ["c", "t", "z"], ["y"]),
    ]
    made = model(nodes, {"x": x}, ["y"], constants)
    found, wanted = compiled(made, {"x": x})["y"], reference(made, {"x": x})["y"]
    assert found.dtype == np.int8
    assert np.abs(found.astype(int) - wanted).max() <= 1


def qoperator_model(per_channel: bool) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """What ONNX Runtime's quantizer writes in its QOperator format."""
    rng = np.random.default_rng(4)
    x = rng.uniform(-1, 1, (1, 3, 12, 12)).astype(np.float32)

    def scheme(name, scale, zero):
        return {name + "_s": np.float32(scale), name + "_z": np.uint8(zero)}

    def weights(name, shape):
        scale = rng.uniform(0.005, 0.01, shape[0] if per_channel else ()).astype(np.float32)
        return {name: rng.integers(-127, 128, shape).astype(np.int8), name + "_s": scale,
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
    constants = {"w": rng.integers(-127, 128, (64, 32)).astype(np.int8), "ws": np.float32(0.01),
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


@pytest.mark.parametrize("shape", [(1, 16, 4, 4), (2, 20, 5, 3), (1, 256), (3, 7)])
@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
def test_silu_of_bytes_is_one_table(shape, dtype):
    """x * Sigmoid(x) with a Q/DQ pair behind the Sigmoid: equal to ONNX Runtime's but at ties, with no arithmetic."""
    rng = np.random.default_rng(6)
    x = (rng.standard_normal(shape) * 4).astype(np.float32)
    low = 0 if dtype == np.uint8 else -128
    nodes, constants = [], {}
    for name, scale, zero, made in (
        ("x", 0.07, 90, []),
        ("s", 1 / 255, 0, [node("Sigmoid", ["xd"], ["s"])]),
        ("y", 0.05, 6, [node("Mul", ["xd", "sd"], ["y"])]),
    ):
        pair, held = quantized(name, scale, zero + low, dtype)
        nodes += [*made, *pair]
        constants |= held
    built = model(nodes, {"x": x}, ["yd"], constants)
    names = list(pipeline.prim_funcs(TARGET.lower(built).module))
    if TARGET.machine().lanes == 16:
        assert any("lookup" in name for name in names), names
        assert not any("sigmoid" in name or "multiply" in name for name in names), names
    found, wanted = compiled(built, {"x": x})["yd"], reference(built, {"x": x})["yd"]
    assert np.abs(found - wanted).max() <= 0.05 + 1e-6
    assert np.mean(found != wanted) < 0.02


def test_a_decomposed_hard_swish_is_one_table():
    """x * clip(x + 3, 0, 6) / 6, as exporters write it."""
    x = (np.random.default_rng(7).standard_normal((1, 24, 6, 5)) * 3).astype(np.float32)
    first, held = quantized("x", 0.06, 60)
    last, more = quantized("y", 0.04, 10)
    nodes = [
        *first,
        node("Add", ["xd", "three"], ["a"]),
        node("Clip", ["a", "zero", "six"], ["c"]),
        node("Mul", ["xd", "c"], ["m"]),
        node("Div", ["m", "six"], ["y"]),
        *last,
    ]
    numbers = {"three": np.array(3, np.float32), "zero": np.array(0, np.float32), "six": np.array(6, np.float32)}
    built = model(nodes, {"x": x}, ["yd"], held | more | numbers)
    if TARGET.machine().lanes == 16:
        assert any("lookup" in name for name in pipeline.prim_funcs(TARGET.lower(built).module))
    found, wanted = compiled(built, {"x": x})["yd"], reference(built, {"x": x})["yd"]
    assert np.abs(found - wanted).max() <= 0.04 + 1e-6
    assert np.mean(found != wanted) < 0.02


@pytest.mark.parametrize("mcpu", ["cascadelake", "x86-64-v3"])
@pytest.mark.parametrize("count", [1, 3, 16, 32, 48, 64, 256])
def test_lookup_reads_every_byte(mcpu, count):
    """The operator by itself, at every width that code is generated for."""
    import tvm
    from tvm import te

    from graphopt.targets.relax import lookup

    target = runnable(mcpu).tvm_target()
    table = np.random.default_rng(0).permutation(256).astype(np.uint8)
    data = te.placeholder((256 // count, count), "uint8", name="data")
    made: Any = te.compute(data.shape, lambda i, j: lookup.looked_up(table, "uint8")(data[i, j]), name="made")
    operands: Any = [data, made]
    schedule = new_schedule(te.create_prim_func(operands))
    if count > 1:
        schedule.vectorize(schedule.get_loops("made")[-1])
    with target, tvm.transform.PassContext(opt_level=3):
        run = tvm.compile(schedule.mod, target=target)
    source = np.arange(256 // count * count, dtype=np.uint8).reshape(-1, count)
    result = tvm.runtime.empty(source.shape, "uint8")
    run.jit()["main"](tvm.runtime.tensor(source), result)
    np.testing.assert_array_equal(result.numpy(), table[source])


@pytest.mark.parametrize("activation", ["Relu", "Clip"])
@pytest.mark.parametrize("seed", range(3))
def test_bytes_are_those_of_onnx_runtime(seed, activation):
    """Convolution, depthwise convolution, residual Add and global mean, bit for bit as its integer kernels round.

    Weights of 7 bits: ONNX Runtime adds pairs of products in 16 bits where the processor has nothing better.
    """
    rng = np.random.default_rng(seed)
    x = rng.uniform(-2, 2, (1, 3, 33, 35)).astype(np.float32)
    nodes: list[onnx.NodeProto] = []
    constants: dict[str, np.ndarray] = {"low": np.array(0, np.float32), "high": np.array(6, np.float32)}

    def pair(name, scale, point):
        made, held = quantized(name, scale, point)
        nodes.extend(made)
        constants.update(held)
        return name + "d"

    def layer(data, name, shape, out, scale, **attributes):
        weights = rng.integers(-63, 64, shape).astype(np.int8)
        scales = rng.uniform(0.005, 0.02, shape[0]).astype(np.float32)
        bias_scales = (scales * np.float32(scale)).astype(np.float32)
        constants.update({
            name: weights, name + "_s": scales, name + "_z": np.zeros(shape[0], np.int8),
            name + "b": rng.integers(-3000, 3000, shape[0]).astype(np.int32), name + "b_s": bias_scales,
            name + "b_z": np.zeros(shape[0], np.int32),
        })  # fmt: skip
        nodes.append(node("DequantizeLinear", [name, name + "_s", name + "_z"], [name + "d"], axis=0))
        nodes.append(node("DequantizeLinear", [name + "b", name + "b_s", name + "b_z"], [name + "bd"], axis=0))
        nodes.append(node("Conv", [data, name + "d", name + "bd"], [out], **attributes))

    def activate(name, out):
        bounds = ["low", "high"] if activation == "Clip" else []
        nodes.append(node(activation, [name, *bounds], [out]))

    layer(pair("x", 4 / 255, 128), "w1", (24, 3, 3, 3), "c1", 4 / 255, pads=[1, 1, 1, 1], strides=[2, 2])
    activate("c1", "r1")
    r1 = pair("r1", 6 / 255, 0)
    layer(r1, "w2", (24, 1, 3, 3), "c2", 6 / 255, pads=[1, 1, 1, 1], group=24)
    activate("c2", "r2")
    layer(pair("r2", 6 / 255, 0), "w3", (24, 24, 1, 1), "c3", 6 / 255)
    nodes.append(node("Add", [pair("c3", 0.031, 119), r1], ["a1"]))
    a1 = pair("a1", 0.043, 101)
    layer(a1, "w4", (40, 24, 3, 3), "c4", 0.043, pads=[1, 1, 1, 1])
    c4 = pair("c4", 0.21, 127)
    nodes.append(node("GlobalAveragePool", [c4], ["g1"]))
    pair("g1", 0.009, 120)
    made = model(nodes, {"x": x}, ["x" + "q", "r1q", "r2q", "a1q", "c4q", "g1q"], constants)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        ir.to_proto(made).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    found = compiled(made, {"x": x})
    for name, wanted in zip([o.name for o in session.get_outputs()], session.run(None, {"x": x}), strict=True):
        np.testing.assert_array_equal(found[name], np.asarray(wanted), err_msg=name)


@pytest.mark.parametrize(("group", "stride", "zero"), [(1, 2, 0), (1, 2, 77), (1, 1, 9), (2, 2, 5), (1, 3, 128)])
def test_transposed_convolution_of_bytes(group, stride, zero):
    """One integer convolution a phase: scales of 1, so that what comes out are the sums."""
    rng = np.random.default_rng(12)
    x = rng.integers(0, 256, (1, 8, 6, 5)).astype(np.uint8)
    w = rng.integers(-127, 128, (8, 12 // group, 4, 4)).astype(np.int8)
    constants = {"s": np.array(1, np.float32), "z": np.array(zero, np.uint8), "w": w, "one": np.array(1, np.float32),
                 "nought": np.array(0, np.int8), "b": rng.integers(-99, 99, 12).astype(np.float32)}  # fmt: skip
    nodes = [
        node("DequantizeLinear", ["x", "s", "z"], ["xd"]),
        node("DequantizeLinear", ["w", "one", "nought"], ["wd"]),
        node("ConvTranspose", ["xd", "wd", "b"], ["y"], strides=[stride, stride], pads=[1, 1, 1, 1], group=group),
    ]
    made = model(nodes, {"x": x}, ["y"], constants)
    names = list(pipeline.prim_funcs(TARGET.lower(made).module))
    assert any("rescale" in name for name in names), names
    np.testing.assert_array_equal(compiled(made, {"x": x})["y"], reference(made, {"x": x})["y"])


@pytest.mark.parametrize("zero", [0, 40])
def test_one_dimensional_convolution_of_bytes(zero):
    rng = np.random.default_rng(13)
    x = rng.integers(0, 256, (2, 12, 30)).astype(np.uint8)
    w = rng.integers(-127, 128, (20, 12, 5)).astype(np.int8)
    constants = {"s": np.array(1, np.float32), "z": np.array(zero, np.uint8), "w": w,
                 "ws": np.ones(20, np.float32), "wz": np.zeros(20, np.int8)}  # fmt: skip
    nodes = [
        node("DequantizeLinear", ["x", "s", "z"], ["xd"]),
        node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], axis=0),
        node("Conv", ["xd", "wd"], ["y"], pads=[2, 1], strides=[2]),
    ]
    made = model(nodes, {"x": x}, ["y"], constants)
    assert any("rescale" in name for name in pipeline.prim_funcs(TARGET.lower(made).module))
    np.testing.assert_array_equal(compiled(made, {"x": x})["y"], reference(made, {"x": x})["y"])
