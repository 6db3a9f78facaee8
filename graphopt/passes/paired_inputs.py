"""What a layer multiplies, in the model as it was and as it is by now: moments of both, in one pass over the data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt.calibration.observe import up_to, watch
from graphopt.calibration.resumed import ResumedRuns
from graphopt.graph import attribute, constant_of
from graphopt.passes.base import Context
from graphopt.passes.quantization.moments import MAX_TAPS, covariance_elements, draws, in_parts, patches
from graphopt.passes.quantization.placement import Layer
from graphopt.progress import SILENT, Progress

FLUSH_ROWS = 1024
"""Rows gathered before they are multiplied into the covariances."""


@dataclass(frozen=True)
class PairedMoments:
    """Of one layer's inputs over `rows` rows: x in the model as it was, z in the model as it is by now.

    `first_mean`, `mean`: (groups, taps) of x and of z. `covariance`: (groups, taps, taps) of z; None for a layer of
    more than `MAX_TAPS` taps. `crossed`: (groups, taps, taps), of x along the rows with z along the columns; None
    there too, and where both models are one.
    """

    first_mean: np.ndarray
    mean: np.ndarray
    covariance: np.ndarray | None
    crossed: np.ndarray | None
    rows: int
    first_variance: np.ndarray | None = None
    """(groups, taps) of x; None where both models are one."""


def observe_pairs(
    first: ir.Model,
    second: ir.Model | None,
    layers: Sequence[Layer],
    context: Context,
    runs: tuple[ResumedRuns, ResumedRuns] | None = None,
) -> Iterator[tuple[Layer, PairedMoments]]:
    """Each layer's inputs in `first`, the model as it was, and `second`, as it is by now (None: the same).

    The inputs have one name in both. `runs`: of the two models, whose layers change from call to call only behind those
    observed so far. Raises ModelError and DataError as `collect_statistics` does.
    """
    assert context.data is not None
    each = 1 if second is None else 2
    for part in in_parts(layers, lambda layer: each * covariance_elements(*group_taps(layer))):
        names = [str(layer.input.name) for layer in part]
        sums = [_LayerSums(layer, context.seed, second is not None) for layer in part]
        label = "observe layers' inputs"
        for values, others in watch_pairs(first, second, names, names, context, label, runs):
            for name, total in zip(names, sums, strict=True):
                total.add(values[name], others[name])
        for layer in part:
            yield layer, sums.pop(0).moments()


def group_taps(layer: Layer) -> tuple[int, int]:
    """Groups, and weights of one output channel."""
    weights = constant_of(layer.node.inputs[layer.weight_index])
    assert weights is not None
    if layer.node.op_type != "Conv":
        return 1, weights.size // weights.shape[layer.channel_axis]
    return attribute(layer.node, "group", 1), int(np.prod(weights.shape[1:], dtype=int))


def watch_pairs(
    first: ir.Model,
    second: ir.Model | None,
    first_names: Sequence[str],
    second_names: Sequence[str],
    context: Context,
    label: str,
    runs: tuple[ResumedRuns, ResumedRuns] | None = None,
) -> Iterator[tuple[dict[str, np.ndarray], dict[str, np.ndarray]]]:
    """Batch by batch, values of `first` and of `second` (None: of `first` again) on the calibration data.

    `runs` as in `observe_pairs`. Raises ModelError and DataError as `collect_statistics` does.
    """
    one, two = (None, None) if runs is None else runs
    if second is None:
        names = list(dict.fromkeys((*first_names, *second_names)))
        for values in _watch(first, names, context, one, label, context.progress):
            yield values, values
        return
    before = _watch(first, first_names, context, one, label, context.progress)
    after = _watch(second, second_names, context, two, label)
    yield from zip(before, after, strict=True)


def _watch(
    model: ir.Model,
    names: Sequence[str],
    context: Context,
    runs: ResumedRuns | None,
    label: str,
    progress: Progress = SILENT,
) -> Iterator[dict[str, np.ndarray]]:
    if runs is not None:
        return runs.watch(model, names, label=label, progress=progress)
    assert context.data is not None
    return watch(up_to(model, names), names, context.data, label=label, progress=progress)


class _LayerSums:
    def __init__(self, layer: Layer, seed: int, paired: bool):
        groups, taps = group_taps(layer)
        self.layer, self.paired = layer, paired
        self.first_rng, self.second_rng = draws(seed, layer), draws(seed, layer)
        self.sums = PairedSums(groups, taps if paired else None, taps)

    def add(self, first: np.ndarray, second: np.ndarray) -> None:
        """The layer's input in both models, for the same samples."""
        other = patches(self.layer, second, self.second_rng)
        self.sums.add(patches(self.layer, first, self.first_rng) if self.paired else other, other)

    def moments(self) -> PairedMoments:
        return self.sums.moments()


class PairedSums:
    """Sums over pairs of rows, x of `first_taps` and z of `taps`; first_taps None: x is z, and nothing is crossed.

    Summed are deviations from the mean of the rows that came first: of an input that hardly varies, or not at all,
    float32 products of the values themselves would tell nothing but their rounding.
    """

    def __init__(self, groups: int, first_taps: int | None, taps: int):
        self.paired = first_taps is not None
        self.waiting: list[tuple[np.ndarray, np.ndarray]] = []
        self.rows = 0
        self.origins: tuple[np.ndarray, np.ndarray] | None = None
        self.first = np.zeros((groups, taps if first_taps is None else first_taps))
        self.first_squares, self.second = np.zeros_like(self.first), np.zeros((groups, taps))
        self.squares = self.crossed = None
        if taps <= MAX_TAPS:
            self.squares = np.zeros((groups, taps, taps))
            self.crossed = np.zeros((groups, first_taps, taps)) if first_taps is not None else None

    def add(self, first: np.ndarray, second: np.ndarray) -> None:
        """(groups, rows, taps) of both, row for row."""
        self.waiting.append((first.astype(np.float32), second.astype(np.float32)))
        if sum(rows.shape[1] for rows, _ in self.waiting) >= FLUSH_ROWS:
            self._flush()

    def _flush(self) -> None:
        first, second = (np.concatenate(each, axis=1) for each in zip(*self.waiting, strict=True))
        self.waiting.clear()
        if self.origins is None:
            means = [each.mean(axis=1, keepdims=True, dtype=np.float64) for each in (first, second)]
            self.origins = means[0].astype(np.float32), means[1].astype(np.float32)
        first, second = first - self.origins[0], second - self.origins[1]
        self.rows += second.shape[1]
        self.first += first.sum(axis=1, dtype=np.float64)
        self.second += second.sum(axis=1, dtype=np.float64)
        if self.paired:
            self.first_squares += np.square(first, dtype=np.float64).sum(axis=1)
        if self.squares is not None:
            self.squares += second.transpose(0, 2, 1) @ second
        if self.crossed is not None:
            self.crossed += first.transpose(0, 2, 1) @ second

    def moments(self) -> PairedMoments:
        """Of all rows so far."""
        if self.waiting:
            self._flush()
        assert self.origins is not None
        first, second = self.first / self.rows, self.second / self.rows
        covariance = crossed = None
        variance = np.maximum(self.first_squares / self.rows - first**2, 0.0) if self.paired else None
        if self.squares is not None:
            covariance = self.squares / self.rows - second[:, :, None] * second[:, None, :]
        if self.crossed is not None:
            crossed = self.crossed / self.rows - first[:, :, None] * second[:, None, :]
        means = first + self.origins[0][:, 0], second + self.origins[1][:, 0]
        return PairedMoments(*means, covariance, crossed, self.rows, variance)
