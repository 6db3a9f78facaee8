"""What a layer's factors are fitted on: its inputs in the model as it was and as it is by now."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt.passes.base import Context
from graphopt.passes.low_rank.choose import Split
from graphopt.passes.low_rank.metric import Metric
from graphopt.passes.low_rank.problem import Problem
from graphopt.passes.paired_inputs import PairedMoments, observe_pairs
from graphopt.passes.quantization.moments import MAX_TAPS


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
    layers = [problem.layer for problem in problems]
    for problem, (_, moments) in zip(problems, observe_pairs(first, second, layers, context), strict=True):
        yield problem, inputs_of(moments)


def has_covariance(problem: Problem) -> bool:
    """Whether a layer of this size gets one."""
    return problem.shape.taps <= MAX_TAPS


def inputs_of(moments: PairedMoments) -> Inputs:
    """What a layer is fitted on, from the moments of its inputs."""
    covariance, crossed = moments.covariance, moments.crossed
    if covariance is None:
        return Inputs([Metric()] * len(moments.mean), moments.mean, moments.first_mean, None)
    metrics = [Metric.of_inputs(each, moments.rows) for each in covariance]
    if crossed is None:
        return Inputs(metrics, moments.mean, moments.first_mean, None)
    regression = [metric.regress(c - k) for metric, c, k in zip(metrics, crossed, covariance, strict=True)]
    return Inputs(metrics, moments.mean, moments.first_mean, np.stack(regression))


def mean_lost(problem: Problem, split: Split, inputs: Inputs) -> np.ndarray:
    """What the outputs would lose of their mean, (channels,)."""
    size = (problem.groups, problem.shape.outputs, -1)
    whole = np.einsum("got,gt->go", problem.weights.reshape(size), inputs.first_means)
    return (whole - np.einsum("got,gt->go", split.product().reshape(size), inputs.means)).reshape(-1)
