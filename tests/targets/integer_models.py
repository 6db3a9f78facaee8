"""Small models that multiply bytes, and what plain numpy makes of them."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from graphopt import capabilities
from graphopt.targets.cpu import Cpu
from tests.targets.oracle import model, node


def runnable(mcpu: str) -> Cpu:
    target = Cpu(mcpu=mcpu, threads=1)
    missing = sorted(target.features - capabilities.host_features())
    if missing:
        pytest.skip(f"this processor lacks {', '.join(missing)}, which {mcpu} has")
    return target


def quantized_conv(
    seed: int,
    shape,
    outs,
    kernel,
    *,
    zero: int,
    weights: int = 127,
    bias: bool = False,
    dtype: type = np.uint8,
    **attributes,
):
    """x of bytes -> DequantizeLinear -> Conv of int8 weights with scales of 1: its output is the 32-bit sums."""
    rng = np.random.default_rng(seed)
    groups = attributes.get("group", 1)
    x = rng.integers(np.iinfo(dtype).min, np.iinfo(dtype).max + 1, shape).astype(dtype)
    w = rng.integers(-weights, weights + 1, (outs, shape[1] // groups, *kernel)).astype(np.int8)
    constants = {"s": np.float32(1), "z": dtype(zero), "w": w, "ws": np.ones(outs, np.float32),
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


def residual_network(seed: int, activation: str, dtype: type = np.uint8) -> tuple[ir.Model, dict[str, np.ndarray]]:
    """Convolution, depthwise convolution, residual Add and global mean, whose bytes are the outputs.

    ONNX Runtime has integer kernels for all of it. Weights of 7 bits: it adds pairs of products in 16 bits where the
    processor has nothing better.
    """
    rng = np.random.default_rng(seed)
    x = rng.uniform(-2, 2, (1, 3, 33, 35)).astype(np.float32)
    low = 0 if dtype is np.uint8 else -128
    nodes: list[onnx.NodeProto] = []
    constants: dict[str, np.ndarray] = {"low": np.array(0, np.float32), "high": np.array(6, np.float32)}

    def pair(name, scale, point):
        made, held = quantized(name, scale, low + point, dtype)
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
    return model(nodes, {"x": x}, ["xq", "r1q", "r2q", "a1q", "c4q", "g1q"], constants), {"x": x}


def integer_reference(made: ir.Model, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What ONNX Runtime's integer kernels make of it: with its optimisations, which put them in."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    content = ir.to_proto(made).SerializeToString()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, map(np.asarray, session.run(None, feeds)), strict=True))
