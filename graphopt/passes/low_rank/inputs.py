"""What a layer multiplies, in the model as it was and as it is by now: moments of both, in one pass over the data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from graphopt.calibration.observe import watch
from graphopt.passes.base import Context
from graphopt.passes.low_rank.metric import Metric
from graphopt.passes.low_rank.problem import Problem
from graphopt.passes.quantization.moments import MAX_TAPS, patches

MOST_ELEMENTS = 64 << 20
"""Of all covariances that are kept at one time: 512 MiB."""
FLUSH_ROWS = 1024
"""Rows gathered before they are multiplied into the covariances."""


@dataclass(frozen=True)
class Inputs:
    """Of one layer: `metrics` and `means` (groups, taps) of its inputs in the model as it is by now.

    `first_means`: in the model as it was. `regression`: (groups, taps, taps) or None where both models are one: the
    best linear guess of the first inputs' deviations from the second's, x - m ~ R (x' - m').
    """

    metrics: list[Metric]
    means: np.ndarray
    first_means: np.ndarray
    regression: np.ndarray | None


def observe_inputs(
    first: ir.Model, second: ir.Model | None, problems: Sequence[Problem], context: Context
) -> Iterator[tuple[Problem, Inputs]]:
    """Each problem's inputs in `first`, the model as it was, and `second`, as it is by now (None: the same).

    The inputs have one name in both. A layer too large for a covariance gets plain metrics. Raises ModelError and
    DataError as `collect_statistics` does.
    """
    assert context.data is not None
    for part in _parts(problems, 1 if second is None else 2):
        names = [str(problem.layer.input.name) for problem in part]
        sums = [_Sums(problem, (context.seed, index), second is not None) for index, problem in enumerate(part)]
        label = "observe layers' inputs"
        before = watch(_up_to(first, names), names, context.data, label=label, progress=context.progress)
        after = before if second is None else watch(_up_to(second, names), names, context.data, label=label)
        for values in before:
            others = values if after is before else next(after)
            for name, total in zip(names, sums, strict=True):
                total.add(values[name], others[name])
        for problem in part:
            yield problem, sums.pop(0).inputs()


def has_covariance(problem: Problem) -> bool:
    """Whether a layer of this size gets one."""
    return problem.shape.taps <= MAX_TAPS


class _Sums:
    def __init__(self, problem: Problem, seed: tuple[int, int], paired: bool):
        size = (problem.groups, problem.shape.taps)
        self.problem, self.seed, self.paired = problem, seed, paired
        self.first_rng, self.second_rng = np.random.default_rng(seed), np.random.default_rng(seed)
        self.waiting: list[tuple[np.ndarray, np.ndarray]] = []
        self.rows = 0
        self.first, self.second = np.zeros(size), np.zeros(size)
        self.squares = self.crossed = None
        if has_covariance(problem):
            self.squares = np.zeros((*size, size[1]))
            self.crossed = np.zeros((*size, size[1])) if paired else None

    def add(self, first: np.ndarray, second: np.ndarray) -> None:
        """The layer's input in both models, for the same samples."""
        other = patches(self.problem.layer, second, self.second_rng).astype(np.float32)
        own = patches(self.problem.layer, first, self.first_rng).astype(np.float32) if self.paired else other
        self.waiting.append((own, other))
        if sum(rows.shape[1] for rows, _ in self.waiting) >= FLUSH_ROWS:
            self._flush()

    def _flush(self) -> None:
        first, second = (np.concatenate(each, axis=1) for each in zip(*self.waiting, strict=True))
        self.waiting.clear()
        self.rows += second.shape[1]
        self.first += first.sum(axis=1, dtype=np.float64)
        self.second += second.sum(axis=1, dtype=np.float64)
        if self.squares is not None:
            self.squares += second.transpose(0, 2, 1) @ second
        if self.crossed is not None:
            self.crossed += first.transpose(0, 2, 1) @ second

    def inputs(self) -> Inputs:
        if self.waiting:
            self._flush()
        first, second = self.first / self.rows, self.second / self.rows
        if self.squares is None:
            return Inputs([Metric()] * self.problem.groups, second, first, None)
        covariance = self.squares / self.rows - second[:, :, None] * second[:, None, :]
        metrics = [Metric.of_inputs(each, self.rows) for each in covariance]
        if self.crossed is None:
            return Inputs(metrics, second, first, None)
        crossed = self.crossed / self.rows - first[:, :, None] * second[:, None, :]
        regression = [metric.regress(c - k) for metric, c, k in zip(metrics, crossed, covariance, strict=True)]
        return Inputs(metrics, second, first, np.stack(regression))


def _up_to(model: ir.Model, names: Sequence[str]) -> ir.Model:
    """A copy that computes these values and, where they are inputs, at least something."""
    part = model.clone()
    wanted = [value for node in part.graph for value in node.outputs if value.name in names]
    if wanted:
        part.graph.outputs.clear()
        part.graph.outputs.extend(wanted)
        RemoveUnusedNodesPass()(part)
    return part


def _parts(problems: Sequence[Problem], each: int) -> Iterator[list[Problem]]:
    part: list[Problem] = []
    size = 0
    for problem in problems:
        own = each * problem.groups * problem.shape.taps**2 if has_covariance(problem) else 0
        if part and size + own > MOST_ELEMENTS:
            yield part
            part, size = [], 0
        part.append(problem)
        size += own
    if part:
        yield part
