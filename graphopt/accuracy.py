"""How right a model is: top-1 on labels, else agreement with a reference, else signal-to-noise.

top1        share of samples whose largest output is the label, in percent
agreement   share of samples whose largest output is the reference's, in percent
snr         10 log10(sum y_ref^2 / sum (y - y_ref)^2), the worst output's, in dB
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from graphopt.calibration import Dataset
from graphopt.errors import DataError
from graphopt.model import Signature
from graphopt.progress import SILENT, Progress

Metric = Literal["top1", "agreement", "snr"]
Outputs = Mapping[str, np.ndarray]
Runner = Callable[[Mapping[str, np.ndarray]], Outputs]
BATCH = 16


@dataclass(frozen=True)
class Accuracy:
    """`value` in percent, or in dB for `snr` (infinite when equal), over `count` samples."""

    metric: Metric
    value: float
    count: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def drop_in_points(before: Accuracy | None, after: Accuracy) -> float:
    """Points lost: against `before` where there are labels; agreement is itself against the reference."""
    if after.metric == "snr":
        raise ValueError("signal-to-noise is not counted in points")
    return (100.0 if after.metric == "agreement" or before is None else before.value) - after.value


def evaluate(
    model: Path | bytes | Runner,
    dataset: Dataset,
    *,
    signature: Signature,
    reference: Path | bytes | Runner | None = None,
    progress: Progress = SILENT,
    classes: bool = True,
) -> Accuracy:
    """Measure `model` on `dataset`; models run in ONNX Runtime with all its optimisations on all cores.

    `reference` is the model to agree with where there are no labels. `classes` False: an output that looks like classes
    is none (an embedding, say). Raises DataError: there are neither labels nor a reference.
    """
    run, batch = _runner(model), _batch(model, signature)
    classes = classes and is_classifier(signature)
    if dataset.labels is not None and classes:
        name = signature.outputs[0].name
        right = 0
        for start, feeds in _batches(dataset, batch, progress):
            predicted = np.argmax(run(feeds)[name], axis=1)
            wanted = dataset.labels[start : start + len(predicted)]
            right += int((predicted[: len(wanted)] == wanted).sum())
        return Accuracy("top1", 100.0 * right / len(dataset), len(dataset))
    if reference is None:
        raise DataError("without labels accuracy needs a model to agree with")
    return _against(run, _runner(reference), dataset, signature, classes, batch, progress)


def is_classifier(signature: Signature) -> bool:
    """One output of shape (N, classes), as far as the model says."""
    if len(signature.outputs) != 1:
        return False
    output = signature.outputs[0]
    classes = output.shape[1] if len(output.shape) == 2 else 0
    return output.dtype.kind == "f" and isinstance(classes, int) and classes > 1


def _against(
    run: Runner,
    wanted: Runner,
    dataset: Dataset,
    signature: Signature,
    classes: bool,
    batch: int,
    progress: Progress,
) -> Accuracy:
    names = [o.name for o in signature.outputs if o.dtype.kind == "f"]
    same = 0
    signal, noise = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    for start, feeds in _batches(dataset, batch, progress):
        got, reference = run(feeds), wanted(feeds)
        if classes:
            count = min(len(reference[names[0]]), len(dataset) - start)
            same += int((np.argmax(got[names[0]], 1) == np.argmax(reference[names[0]], 1))[:count].sum())
        for name in names:
            a, b = reference[name].astype(np.float64), got[name].astype(np.float64)
            signal[name] += float(np.square(a).sum())
            noise[name] += float(np.square(a - b).sum())
    if classes:
        return Accuracy("agreement", 100.0 * same / len(dataset), len(dataset))
    ratios = [10 * math.log10(max(signal[n], 1e-300) / noise[n]) for n in names if noise[n] > 0]
    return Accuracy("snr", min(ratios, default=math.inf), len(dataset))


def _batches(dataset: Dataset, size: int, progress: Progress) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    start = 0
    with progress.task("evaluating", len(dataset)) as advance:
        for feeds in dataset.batches(size):
            yield start, feeds
            done = dataset.fixed_batch or min(size, len(dataset) - start)
            start += done
            advance(done)


def _batch(model: Path | bytes | Runner, signature: Signature) -> int:
    dynamic = all(spec.shape and not isinstance(spec.shape[0], int) for spec in signature.inputs)
    return BATCH if dynamic and not callable(model) else 1


def _runner(model: Path | bytes | Runner) -> Runner:
    if callable(model):
        return model
    from graphopt.runtime.onnxruntime_engine import OnnxRuntimeEngine

    return OnnxRuntimeEngine(model).run
