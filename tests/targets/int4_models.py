"""Small models with weights of 4 bits in blocks."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from tests.targets.oracle import EPSILON, uniform


def built(nodes, x: np.ndarray, columns: int, constants: dict[str, onnx.TensorProto]) -> ir.Model:
    graph = helper.make_graph(
        nodes, "blocks",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (*x.shape[:-1], columns))],
        list(constants.values()),
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return ir.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=10))


def int4_product(symmetric: bool, is_bytes: bool, rows: int, depth: int, columns: int, block: int):
    """(rows, depth) times (depth, columns) of 4 bits: a model, feeds, the product in float64, and by how much float32
    may differ from it. `is_bytes`: x is quantized before."""
    rng = np.random.default_rng(5)
    shape = (depth // block, columns)
    integers = rng.integers(-8, 8, (depth, columns))
    scales = rng.uniform(0.01, 0.1, shape).astype(np.float32)
    points = np.zeros(shape, int) if symmetric else rng.integers(-8, 8, shape)
    constants = {
        "w": helper.make_tensor("w", TensorProto.INT4, integers.shape, integers.ravel()),
        "ws": numpy_helper.from_array(scales, "ws"),
        "wz": helper.make_tensor("wz", TensorProto.INT4, shape, points.ravel()),
    }
    weight = (integers - np.repeat(points, block, 0)) * np.repeat(scales.astype(np.float64), block, 0)
    nodes = [helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], axis=0, block_size=block)]
    x = uniform(6, rows, depth)
    real = x.astype(np.float64)
    source = "x"
    if is_bytes:
        constants |= {"s": numpy_helper.from_array(np.array(0.01, np.float32), "s"),
                      "z": numpy_helper.from_array(np.array(119, np.uint8), "z")}  # fmt: skip
        nodes += [helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
                  helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"])]  # fmt: skip
        stored = np.clip(np.rint(x / np.float32(0.01)) + 119, 0, 255)
        real, source = (stored - 119) * np.float64(np.float32(0.01)), "d"
    made = built([*nodes, helper.make_node("MatMul", [source, "wd"], ["y"])], x, columns, constants)
    bound = depth * EPSILON * (np.abs(real) @ np.abs(weight)).max() + 1e-6
    return made, {"x": x}, real @ weight, bound
