"""Returning layers to float when 8 bits cost too much accuracy.

1. Rank: the noise at the outputs when one layer alone is in 8 bits, on a few calibration samples. That is cheap, and
   says what no accuracy on a few samples could. (What the outputs gain when one layer alone goes back to float would
   say nothing where two layers do as much harm each: without either, the other's noise is still there.)
2. Search: the accuracy of the model without its k most harmful layers, for k = 1, 2, 4, ... until the bound holds, then
   bisection between the last that failed and the first that held.
3. Put back: of these k not all are needed: two layers may share the value that does the harm, and all between them in
   the ranking came along. Halves, quarters, ... of them go back to 8 bits where the bound still holds.

The number of full evaluations grows with the logarithm of the number of layers, and what is returned was itself
evaluated.

Which layers suffer is measured, never assumed: first and last layers have no privilege.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt.calibration import Dataset
from graphopt.calibration.observe import open_session
from graphopt.graph import attribute, constant_of, label
from graphopt.model import to_bytes
from graphopt.progress import SILENT, Progress

RANKING_SAMPLES = 16
BuildVariant = Callable[[tuple[str, ...]], ir.Model]


@dataclass(frozen=True)
class Returned:
    """A layer that went back to float, and the outputs' signal-to-noise ratio when it alone is in 8 bits."""

    node: str
    snr_db: float


@dataclass(frozen=True)
class Trial:
    """One full evaluation: how many of the ranked layers were float, and the accuracy lost."""

    excluded: int
    drop: float


@dataclass(frozen=True)
class Recovery:
    """The model within the bound with few layers in float; `met` False: the best that was found."""

    excluded: tuple[Returned, ...]
    model: ir.Model
    drop: float
    met: bool
    trials: tuple[Trial, ...]

    @property
    def nodes(self) -> tuple[str, ...]:
        """Names of the layers returned to float."""
        return tuple(returned.node for returned in self.excluded)


def quantized_layers(model: ir.Model) -> tuple[str, ...]:
    """Names of the nodes whose weights are stored as integers, in graph order."""
    return tuple(weight_bits(model))


def weight_bits(model: ir.Model) -> dict[str, int]:
    """By name of the node, in graph order: the bits of weights that are stored as integers."""
    return {label(node): bits for node in model.graph if (bits := _bits_of(node)) is not None}


def _bits_of(node: ir.Node) -> int | None:
    if node.op_type == "MatMulNBits":
        return int(attribute(node, "bits", 4))
    if node.op_type not in ("Conv", "Gemm", "MatMul") or len(node.inputs) < 2 or node.inputs[1] is None:
        return None
    producer = node.inputs[1].producer()
    if producer is not None and producer.op_type == "Reshape":  # blocks of a Conv's weights lie along its rows
        producer = None if producer.inputs[0] is None else producer.inputs[0].producer()
    if producer is None or producer.op_type != "DequantizeLinear" or producer.inputs[0] is None:
        return None
    stored = producer.inputs[0]
    return None if constant_of(stored) is None or stored.dtype is None else round(8 * stored.dtype.itemsize)


def rank_layers(
    build_variant: BuildVariant,
    layers: Sequence[str],
    reference: ir.Model,
    dataset: Dataset,
    *,
    samples: int = RANKING_SAMPLES,
    seed: int = 0,
    progress: Progress = SILENT,
) -> tuple[Returned, ...]:
    """`layers` by the noise that each makes when the others are float, most first.

    `build_variant(excluded)` makes the quantized model with these nodes left float; `reference` is the float model.
    The signal-to-noise ratio is taken on `samples` of `dataset`, the worst output's, in dB.
    """
    drawn, _ = dataset.draw(min(samples, len(dataset)), seed)
    wanted = _outputs(reference, drawn)
    found: list[Returned] = []
    with progress.task("rank layers by the noise they add", len(layers)) as advance:
        for layer in layers:
            alone = _outputs(build_variant(tuple(other for other in layers if other != layer)), drawn)
            ratios = [_ratio_db(signal, noise) for signal, noise in zip(wanted, alone, strict=True)]
            found.append(Returned(layer, min(ratios, default=math.inf)))
            advance(1)
    return tuple(sorted(found, key=lambda returned: returned.snr_db))


def recover(
    build_variant: BuildVariant,
    ranked: Sequence[Returned],
    evaluate: Callable[[ir.Model], float],
    max_drop: float,
    progress: Progress = SILENT,
) -> Recovery:
    """Return the first few of `ranked` to float, as few as keep the accuracy lost within `max_drop`, and of these only
    as many as are needed.

    `build_variant(excluded)` makes the model with these nodes left float; `evaluate` gives the points it loses.
    """
    trials: dict[tuple[Returned, ...], float] = {}
    models: dict[tuple[Returned, ...], ir.Model] = {}

    def holds(excluded: tuple[Returned, ...]) -> bool:
        if excluded not in trials:
            model = build_variant(tuple(returned.node for returned in excluded))
            trials[excluded] = evaluate(model)
            progress.note(f"{len(excluded)} of {len(ranked)} layers in float: {trials[excluded]:.3f} points lost")
            best = min(trials, key=lambda each: (_excess(trials[each], max_drop), len(each)))
            if best == excluded:  # only the best is kept in memory
                models.clear()
                models[excluded] = model
        return trials[excluded] <= max_drop + 1e-9

    ranked = tuple(ranked)
    count = _shortest(len(ranked), lambda k: holds(ranked[:k]))
    if count is not None:
        _put_back(ranked[:count], holds)
    best, model = next(iter(models.items()))
    record = tuple(Trial(len(excluded), drop) for excluded, drop in trials.items())
    return Recovery(best, model, trials[best], trials[best] <= max_drop + 1e-9, record)


def _shortest(most: int, holds: Callable[[int], bool]) -> int | None:
    """The least k that holds, as far as doubling and bisection find it; None where not even `most` does."""
    failed, held = -1, 0
    while not holds(held):
        failed = held
        if held == most:
            return None
        held = min(most, max(1, 2 * held))
    while held - failed > 1:
        middle = (failed + held) // 2
        failed, held = (failed, middle) if holds(middle) else (middle, held)
    return held


def _put_back(excluded: tuple[Returned, ...], holds: Callable[[tuple[Returned, ...]], bool]) -> None:
    """Try to do without parts of `excluded`, the least harmful first; the last of all is known to be needed."""
    tries = 2 * len(excluded).bit_length()
    size = (len(excluded) - 1) // 2 or 1
    while size and len(excluded) > 1:
        for end in range(len(excluded) - 1, 0, -size):
            if tries == 0:
                return
            tries -= 1
            rest = excluded[: max(0, end - size)] + excluded[end:]
            if holds(rest):
                excluded = rest
        size //= 2


def _excess(drop: float, max_drop: float) -> float:
    return max(0.0, drop - max_drop - 1e-9)


def _outputs(model: ir.Model, dataset: Dataset) -> list[np.ndarray]:
    session = open_session(to_bytes(model))
    batches = [session.run(None, feeds) for feeds in dataset.batches(1)]
    columns = [np.stack([np.asarray(row[index]) for row in batches]) for index in range(len(batches[0]))]
    return [column.astype(np.float64) for column in columns if column.dtype.kind == "f"]


def _ratio_db(wanted: np.ndarray, got: np.ndarray) -> float:
    signal, noise = float(np.square(wanted).sum()), float(np.square(wanted - got).sum())
    if noise == 0.0:
        return math.inf
    return -math.inf if signal == 0.0 else 10 * math.log10(signal / noise)
