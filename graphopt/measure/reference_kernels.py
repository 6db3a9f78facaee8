"""Small kernels that every machine can time: how two machines differ, as far as a few numbers can say it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np

SECONDS = 0.1
"""For each kernel; the median of its runs counts."""
FEWEST = 5


def time_reference(threads: int, seconds: float = SECONDS) -> dict[str, float]:
    """Seconds of a run by kernel: a product of matrices and a convolution in ONNX Runtime, and a copy of memory.

    About three times `seconds`, and the time to import ONNX Runtime.
    """
    return {name: _median(run, seconds) for name, run in _kernels(threads).items()}


def _median(run: Callable[[], object], seconds: float) -> float:
    for _ in range(3):
        run()
    samples: list[float] = []
    begin = time.perf_counter()
    while len(samples) < FEWEST or time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        run()
        samples.append(time.perf_counter() - start)
    return statistics.median(samples)


def _kernels(threads: int) -> dict[str, Callable[[], object]]:
    rng = np.random.default_rng(0)

    def noise(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    source = np.zeros(4 << 20, np.float32)  # 16 MB: more than most caches hold
    target = np.empty_like(source)
    return {
        "matmul": _operator("MatMul", noise(128, 512), noise(512, 512), threads),
        "convolution": _operator("Conv", noise(1, 64, 28, 28), noise(64, 64, 3, 3), threads),
        "memory": lambda: np.copyto(target, source),
    }


def _operator(op: str, data: np.ndarray, weight: np.ndarray, threads: int) -> Callable[[], object]:
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    graph = helper.make_graph(
        [helper.make_node(op, ["x", "w"], ["y"])],
        "reference",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(data.shape))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {"x": data})
