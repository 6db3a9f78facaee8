"""One streaming pass over the data with ONNX Runtime, watching values inside a model."""

from __future__ import annotations

import os
from collections.abc import Iterable

import numpy as np
import onnx
import onnx_ir as ir

from graphopt.calibration.dataset import Dataset
from graphopt.calibration.statistics import Observer, TensorStatistics
from graphopt.errors import DataError, ModelError
from graphopt.progress import SILENT, Progress

BATCH = 4
"""Samples a step: every watched value of a batch is in memory at once, so it is kept small."""


def collect_statistics(
    model: ir.Model, names: Iterable[str], dataset: Dataset, *, progress: Progress = SILENT
) -> dict[str, TensorStatistics]:
    """Statistics of the float values called `names` while `model` runs over `dataset`, in one pass.

    Nothing but the statistics is kept. Raises ModelError: ONNX Runtime refuses the model, or a value is unknown or
    not float; DataError: no samples, the model refuses them, or a value becomes NaN or infinite.
    """
    import onnxruntime

    wanted = list(dict.fromkeys(names))
    if len(dataset) == 0:
        raise DataError(f"no calibration samples in {dataset.source}")
    inputs = {str(value.name) for value in model.graph.inputs}
    outputs = {str(value.name) for value in model.graph.outputs}
    produced = {str(value.name) for node in model.graph for value in node.outputs}
    for name in wanted:
        if name not in inputs and name not in produced:
            raise ModelError(f"there is no value {name!r} in the model to observe")
    inner = [name for name in wanted if name not in inputs]
    proto = ir.to_proto(model)
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in inner if name not in outputs)
    session = _session(proto)
    observers = {name: Observer() for name in wanted}
    total = len(dataset)
    with progress.task("calibrate", total) as advance:
        done = 0
        for feeds in dataset.batches(BATCH):
            try:
                results = session.run(inner, feeds) if inner else []
            except (
                onnxruntime.capi.onnxruntime_pybind11_state.RuntimeException,
                onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument,
                onnxruntime.capi.onnxruntime_pybind11_state.Fail,
            ) as error:
                raise DataError(f"the model refuses samples of {dataset.source}: {_first_line(error)}") from error
            for name in wanted:
                array = feeds[name] if name in feeds else results[inner.index(name)]
                _see(observers[name], np.asarray(array), name, dataset.source)
            step = min(dataset.fixed_batch or BATCH, total - done)
            done += step
            advance(step)
    return {name: observer.statistics() for name, observer in observers.items()}


def _see(observer: Observer, array: np.ndarray, name: str, source: str) -> None:
    if array.dtype.kind != "f":
        raise ModelError(f"value {name!r} is {array.dtype}: only float values have statistics")
    try:
        observer.see(array if array.dtype != np.float16 else array.astype(np.float32))
    except ValueError:
        raise DataError(
            f"value {name!r} becomes NaN or infinite on {source}", hint="look at the data and its preprocessing"
        ) from None


def _session(proto: onnx.ModelProto):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except (
        onnxruntime.capi.onnxruntime_pybind11_state.Fail,
        onnxruntime.capi.onnxruntime_pybind11_state.InvalidGraph,
        onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument,
        onnxruntime.capi.onnxruntime_pybind11_state.NotImplemented,
        onnxruntime.capi.onnxruntime_pybind11_state.RuntimeException,
    ) as error:
        raise ModelError(f"ONNX Runtime refuses the model: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0][:300] if str(error) else type(error).__name__
