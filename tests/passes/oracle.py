"""Running models in ONNX Runtime without graph optimisations, and the shapes the shared models are run at."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphopt import model as models
from graphopt.verify import total_reduction_length

SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "squeezenet1_1": {"data": (1, 3, 224, 224)},
    "mobilenetv2": {"input": (1, 3, 224, 224)},
    "mobilenetv1_075": {"input_1": (1, 3, 224, 224)},
    "tiny_darknet": {"image": (1, 3, 224, 224)},
    "facenet": {"input": (1, 3, 160, 160)},
    "deeplabv3_mnv2": {},
    "resnet20_cifar10": {"input": (1, 3, 32, 32)},
    "resnet56_cifar10": {"input": (1, 3, 32, 32)},
    "mnist_cnn": {},
    "ultraface_rfb320": {},
    "yolox_nano": {},
    "nanodet_m": {"data": (1, 3, 320, 320)},
    "super_resolution": {"input": (1, 1, 224, 224)},
    "style_transfer": {"input": (1, 3, 256, 256)},
    "nsnet2": {"features": (1, 100, 161), "h0_1": (1, 1, 400), "h0_2": (1, 1, 400)},
    "gtcrn": {},
    "stories260k": {"input_ids": (1, 64)},
    "magika": {"bytes": (1, 2048)},
}
"""Sizes for the dynamic inputs, as the list of the shared models counts them."""


def run(model: ir.Model, feeds: dict[str, np.ndarray], names: list[str] | None = None) -> list[np.ndarray]:
    """The model's outputs, computed without graph optimisations in one thread."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(models.to_bytes(model), options, providers=["CPUExecutionProvider"])
    return [np.asarray(y) for y in session.run(names, feeds)]


def random_feeds(model: ir.Model, shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, np.ndarray]:
    """Values for every input: normal for floats, small non-negative integers, for static shapes or `shapes`."""
    rng = np.random.default_rng(seed)
    feeds = {}
    for spec in models.signature(model).inputs:
        shape = shapes.get(spec.name, tuple(d if isinstance(d, int) else 1 for d in spec.shape))
        if spec.dtype.kind == "f":
            feeds[spec.name] = rng.standard_normal(shape).astype(spec.dtype)
        elif spec.dtype.kind == "b":
            feeds[spec.name] = rng.integers(0, 2, shape).astype(bool)
        else:
            feeds[spec.name] = rng.integers(0, 256, shape).astype(spec.dtype)
    return feeds


def rounding_bound(model: ir.Model, feeds: dict[str, np.ndarray], stored: type = np.float32) -> list[np.ndarray]:
    """By output and element: how far two evaluations with float32 sums may be apart that agree in real numbers.

    For sums of products and functions that do not amplify errors (Relu, pooling, ...). A dot product of length K errs
    by at most K u |w| |x|, whatever cancels; errors of the inputs are passed on by |w|. So (sum of all K, and six
    roundings an operator for weights, biases and elementwise work) u times the output of the model made of absolute
    values, without clips, bounds each of the two. The six are those of the type that values are `stored` in.
    """
    majorant = model.clone()
    for name, value in majorant.graph.initializers.items():
        if value.const_value is not None and value.const_value.dtype == ir.DataType.FLOAT:
            value.const_value = ir.Tensor(np.abs(value.const_value.numpy()), name=name)
    for node in list(majorant.graph):
        source = node.inputs[0] if node.inputs else None
        if node.op_type == "Clip" and source is not None:
            node.outputs[0].replace_all_uses_with(source, replace_graph_outputs=True)
            majorant.graph.remove(node, safe=True)
    unit, unit_stored = (float(np.finfo(kind).eps) / 2 for kind in (np.float32, stored))
    error = total_reduction_length(model) * unit + 6 * len(model.graph) * unit_stored
    size = run(majorant, {name: np.abs(array) for name, array in feeds.items()})
    return [2 * error * output.astype(np.float64) for output in size]
