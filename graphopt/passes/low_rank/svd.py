"""W ~ U_r (U_r' W): the layer with r outputs, then a mixture of them (1x1 for a convolution).

U: the eigenvectors of W K W', K the metric: the principal components of the outputs. No rank-r layer has less error,
and the error is the sum of the eigenvalues left out; with K = I these are the squares of W's singular values.

Reference: Eckart and Young, Psychometrika 1936 (K = I); Zhang et al., "Accelerating Very Deep Convolutional Networks
for Classification and Detection", TPAMI 2016, section 3.1 (principal components of the outputs).
"""

from __future__ import annotations

from functools import cached_property

import numpy as np

from graphopt.passes.low_rank.metric import Metric
from graphopt.passes.low_rank.stages import Rank, Shape, Stage

NAME = "svd"


def refuses(shape: Shape) -> str | None:
    """Nothing: every linear layer has this form."""
    return None


def full(shape: Shape) -> Rank:
    """The rank that is exact."""
    return (min(shape.outputs, shape.taps),)


def stages(shape: Shape, rank: Rank) -> tuple[Stage, ...]:
    """The layer itself with fewer outputs, then all outputs from these."""
    axes = tuple(range(len(shape.kernel)))
    return (Stage(rank[0], shape.inputs, axes), Stage(shape.outputs, rank[0]))


class Solver:
    """Fits one layer's `weights` (outputs, inputs, *kernel), at any rank."""

    def __init__(self, weights: np.ndarray, metric: Metric, seed: int):
        self.weights, self.metric = weights, metric
        self.rows = weights.reshape(len(weights), -1)

    @cached_property
    def _components(self) -> tuple[np.ndarray, np.ndarray]:
        return components(self.rows, self.metric)

    def error(self, rank: Rank) -> float:
        """The energy that a rank loses, exactly."""
        return float(self._components[0][rank[0] :].sum())

    def fit(self, rank: Rank) -> tuple[np.ndarray, ...]:
        """The weights of the stages."""
        kept = self._components[1][:, : rank[0]]
        first = (kept.T @ self.rows).reshape(rank[0], *self.weights.shape[1:])
        return first, kept.reshape(*kept.shape, *(1,) * (self.weights.ndim - 2))


def components(rows: np.ndarray, metric: Metric) -> tuple[np.ndarray, np.ndarray]:
    """Energies (n,), largest first, and vectors (n, n): the eigensystem of rows K rows'."""
    values, vectors = np.linalg.eigh(metric.times(rows) @ rows.T)
    return np.maximum(values[::-1], 0.0), _signed(vectors[:, ::-1])


def _signed(vectors: np.ndarray) -> np.ndarray:
    """Each column with its largest element positive: eigenvectors have no sign of their own."""
    largest = np.take_along_axis(vectors, np.abs(vectors).argmax(0)[None], 0)
    return vectors * np.where(largest < 0, -1.0, 1.0)
