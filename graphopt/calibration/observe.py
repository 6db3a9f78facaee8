"""One streaming pass over the data with ONNX Runtime, watching values inside a model."""

from __future__ import annotations

import importlib
import os
import weakref
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from graphopt.calibration.dataset import Dataset
from graphopt.calibration.statistics import Observer, TensorStatistics
from graphopt.errors import DataError, ModelError
from graphopt.model import digest
from graphopt.progress import SILENT, Progress

BATCH = 4
"""Samples a step: every watched value of a batch is in memory at once, so it is kept small."""


_known: weakref.WeakKeyDictionary[Dataset, dict[tuple[str, str], TensorStatistics]] = weakref.WeakKeyDictionary()


def collect_statistics(
    model: ir.Model, names: Iterable[str], dataset: Dataset, *, progress: Progress = SILENT
) -> dict[str, TensorStatistics]:
    """Statistics of the float values called `names` while `model` runs over `dataset`, in one pass.

    Nothing but the statistics is kept, with the data set: asked again for the same model and data, they are not
    collected again (returning layers to float asks often). Raises ModelError: ONNX Runtime refuses the model, or a
    value is unknown or not float; DataError: no samples, the model refuses them, or a value becomes NaN or infinite.
    """
    known = _known.setdefault(dataset, {})
    identity = digest(model)
    wanted = list(dict.fromkeys(names))
    observers = {name: Observer() for name in wanted if (identity, name) not in known}
    for values in watch(model, observers, dataset, label="calibrate", progress=progress):
        for name, array in values.items():
            if array.dtype.kind != "f":
                raise ModelError(f"value {name!r} is {array.dtype}: only float values have statistics")
            try:
                observers[name].see(array if array.dtype != np.float16 else array.astype(np.float32))
            except ValueError:
                raise DataError(
                    f"value {name!r} becomes NaN or infinite on {dataset.source}",
                    hint="look at the data and its preprocessing",
                ) from None
    known.update({(identity, name): observer.statistics() for name, observer in observers.items()})
    return {name: known[identity, name] for name in wanted}


def watch(
    model: ir.Model,
    names: Iterable[str],
    dataset: Dataset,
    *,
    label: str,
    progress: Progress = SILENT,
    cut: bool = False,
) -> Iterator[dict[str, np.ndarray]]:
    """Run `model` over `dataset`, a small batch at a time, and yield the values called `names` of each batch.

    `cut`: nothing is computed that these do not depend on.

    Raises ModelError and DataError as `collect_statistics` does.
    """
    wanted = list(dict.fromkeys(names))
    if not wanted:
        return
    if len(dataset) == 0:
        raise DataError(f"no calibration samples in {dataset.source}")
    inputs = {str(value.name) for value in model.graph.inputs}
    produced = {str(value.name) for node in model.graph for value in node.outputs}
    for name in wanted:
        if name not in inputs and name not in produced:
            raise ModelError(f"there is no value {name!r} in the model to observe")
    inner = [name for name in wanted if name not in inputs]
    proto = ir.to_proto(up_to(model, inner) if cut and inner else model)
    outputs = {value.name for value in proto.graph.output}
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in inner if name not in outputs)
    session = open_session(proto.SerializeToString())
    total, done = len(dataset), 0
    with progress.task(label, total) as advance:
        for feeds in dataset.batches(BATCH):
            results = run_batch(session, inner, feeds, dataset.source)
            yield {name: np.asarray(feeds[name] if name in feeds else results[name]) for name in wanted}
            step = min(dataset.fixed_batch or BATCH, total - done)
            done += step
            advance(step)


def run_batch(session: Any, names: list[str], feeds: dict[str, np.ndarray], source: str) -> dict[str, np.ndarray]:
    """Some outputs of a session for one batch from `source`. Raises DataError."""
    try:
        return dict(zip(names, session.run(names, feeds) if names else [], strict=True))
    except engine_errors() as error:
        raise DataError(f"the model refuses samples of {source}: {_first_line(error)}") from error


def up_to(model: ir.Model, names: Collection[str]) -> ir.Model:
    """A copy that computes these values and, where they are inputs, at least something."""
    part = model.clone()
    wanted = [value for node in part.graph for value in node.outputs if value.name in names]
    if wanted:
        part.graph.outputs.clear()
        part.graph.outputs.extend(wanted)
        RemoveUnusedNodesPass()(part)
    return part


def open_session(model: bytes | str, threads: int | None = None):
    """An ONNX Runtime session with every optimisation, on all cores or `threads`. Raises ModelError."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or available_cores()
    options.log_severity_level = 4  # its errors come back as exceptions
    try:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except engine_errors() as error:
        raise ModelError(f"ONNX Runtime refuses the model: {_first_line(error)}") from error


def available_cores() -> int:
    """Processors this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def engine_errors() -> tuple[type[Exception], ...]:
    """What ONNX Runtime raises; it has no common base class of its own."""
    state = importlib.import_module("onnxruntime.capi.onnxruntime_pybind11_state")
    names = ("Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NoSuchFile", "NotImplemented",
             "RuntimeException", "EPFail")  # fmt: skip
    return (*(getattr(state, name) for name in names if hasattr(state, name)), ValueError)


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0][:300] if str(error) else type(error).__name__
