"""Running models in ONNX Runtime without graph optimisations, and the shapes the shared models are run at."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphopt import model as models

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
