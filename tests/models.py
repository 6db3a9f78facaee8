"""Small ONNX models that tests build on the spot."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def small_cnn(seed: int = 0, classes: int = 5, batch: str | int = "N", channels: int = 8) -> onnx.ModelProto:
    """x f32[N,3,8,8] -> Conv, BN, Relu, Identity, Conv, Relu, GlobalAveragePool, Gemm -> y f32[N,classes]."""
    rng = np.random.default_rng(seed)

    def weight(name, *shape, scale=None):
        fan_in = int(np.prod(shape[1:])) or 1
        array = rng.standard_normal(shape) * (scale or (2 / fan_in) ** 0.5)
        return numpy_helper.from_array(array.astype(np.float32), name)

    c = channels
    initializers = [
        weight("w1", c, 3, 3, 3),
        weight("w2", 2 * c, c, 3, 3),
        weight("w3", classes, 2 * c),
        weight("b3", classes, scale=0.1),
        numpy_helper.from_array(rng.uniform(0.5, 1.5, c).astype(np.float32), "gamma"),
        numpy_helper.from_array(rng.normal(0, 0.2, c).astype(np.float32), "beta"),
        numpy_helper.from_array(rng.normal(0, 0.2, c).astype(np.float32), "mean"),
        numpy_helper.from_array(rng.uniform(0.5, 1.5, c).astype(np.float32), "var"),
    ]
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["c1"], "conv1", pads=[1, 1, 1, 1]),
        helper.make_node("BatchNormalization", ["c1", "gamma", "beta", "mean", "var"], ["n1"], "norm1"),
        helper.make_node("Relu", ["n1"], ["r1"], "relu1"),
        helper.make_node("Identity", ["r1"], ["i1"], "identity1"),
        helper.make_node("Conv", ["i1", "w2"], ["c2"], "conv2", pads=[1, 1, 1, 1], strides=[2, 2]),
        helper.make_node("Relu", ["c2"], ["r2"], "relu2"),
        helper.make_node("GlobalAveragePool", ["r2"], ["p"], "pool"),
        helper.make_node("Flatten", ["p"], ["f"], "flatten"),
        helper.make_node("Gemm", ["f", "w3", "b3"], ["y"], "gemm", transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "small_cnn",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, classes])],
        initializers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    return model


def save_small_cnn(folder: Path, name: str = "model.onnx", **options) -> Path:
    """Write `small_cnn(**options)` into `folder`."""
    path = folder / name
    onnx.save(small_cnn(**options), path)
    return path


def save_labelled_data(path: Path, model: Path, count: int = 64, seed: int = 1) -> Path:
    """An .npz of noise labelled by the model itself, so that the input model's top-1 is 100 %."""
    import onnxruntime

    x = np.random.default_rng(seed).standard_normal((count, 3, 8, 8)).astype(np.float32)
    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    outputs = session.run(None, {"x": x})
    np.savez(path, x=x, labels=np.asarray(outputs[0]).argmax(1))
    return path
