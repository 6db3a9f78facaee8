"""Least squares in the metric of a layer's outputs.

With inputs of covariance K, changing the weights of one output channel by e changes that output by a variance of
e K e'. So weights are fitted in the norm |E|^2 = tr(E K E'): K = I gives the plain norm of the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

DAMPING = 1e-3
"""Least share of the mean variance mixed into every variance: directions that the data never took count a little."""
RIDGE = 1e-10
"""Share of the mean of a matrix's diagonal added to it before it is inverted: far below float32's precision."""


@dataclass(frozen=True)
class Metric:
    """`covariance`: (taps, taps) float64, symmetric and positive; None is the identity."""

    covariance: np.ndarray | None = None

    @classmethod
    def of_inputs(cls, covariance: np.ndarray, rows: int) -> Metric:
        """The metric of outputs for inputs of this covariance (taps, taps), measured on so many rows.

        The identity where inputs never vary.
        """
        level = float(np.diagonal(covariance).mean())
        if not level > 0:
            return cls()
        share = shrinkage(covariance, rows)
        return cls((1 - share) * (covariance + covariance.T) / 2 + share * level * np.eye(len(covariance)))

    def times(self, rows: np.ndarray) -> np.ndarray:
        """`rows` (n, taps) times the covariance."""
        return rows if self.covariance is None else rows @ self.covariance

    def energy(self, rows: np.ndarray) -> float:
        """tr(rows K rows'): the sum of squares of what weights `rows` (n, taps) give, about its mean."""
        return max(0.0, float(np.vdot(rows, self.times(rows))))

    def regress(self, excess: np.ndarray) -> np.ndarray:
        """I + excess K^-1 (taps, taps): regression on these inputs of others, whose covariance with these is by
        `excess` more than that of these with themselves."""
        if self.covariance is None:
            return np.eye(len(excess))
        return np.eye(len(excess)) + np.linalg.solve(self.covariance, excess.T).T

    def over(self, kept: int) -> np.ndarray | None:
        """The covariance of the leading part of the taps' index, (kept, kept), a mean over the rest of it."""
        if self.covariance is None:
            return None
        rest = len(self.covariance) // kept
        return np.einsum("pqrq->pr", self.covariance.reshape(kept, rest, kept, rest)) / rest


def shrinkage(covariance: np.ndarray, rows: int) -> float:
    """How much of the mean variance's share of the identity a covariance needs, measured on so few rows.

    Fewer rows than taps leave directions with no variance at all, in which a fit would be free to do anything. The
    oracle approximating shrinkage: Chen, Wiesel, Eldar and Hero, "Shrinkage Algorithms for MMSE Covariance
    Estimation", IEEE Trans. Signal Processing 2010, eq. 23.
    """
    taps = len(covariance)
    squares, square = float(np.square(covariance).sum()), float(np.trace(covariance)) ** 2
    spread = squares - square / taps
    if taps == 1 or not spread > 0:
        return 1.0
    share = ((1 - 2 / taps) * squares + square) / ((max(rows, 1) + 1 - 2 / taps) * spread)
    return min(1.0, max(DAMPING, share))


def regress(seen: np.ndarray, gram: np.ndarray) -> np.ndarray:
    """seen gram^-1 (M, n), for a symmetric positive `gram` (n, n), with a ridge that keeps it finite."""
    level = float(np.trace(gram)) / len(gram)
    return np.linalg.solve(gram + (RIDGE * level or 1.0) * np.eye(len(gram)), seen.T).T


def roots(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The symmetric square root of a positive matrix and the inverse of that root."""
    values, vectors = np.linalg.eigh(matrix)
    values = np.maximum(values, max(float(values[-1]), np.finfo(np.float64).tiny) * RIDGE)
    return (vectors * np.sqrt(values)) @ vectors.T, (vectors / np.sqrt(values)) @ vectors.T


def descend(
    start: np.ndarray,
    expand: Callable[[np.ndarray], np.ndarray],
    collapse: Callable[[np.ndarray], np.ndarray],
    gram: np.ndarray,
    target: np.ndarray,
    metric: Metric,
    steps: int,
    ridge: float = 0.0,
) -> np.ndarray:
    """A factor x, (rank, n), that brings expand(x) nearer to `target` (M, taps): never farther than `start`.

    `expand` is linear in x and `collapse` its transpose; `gram` (rank, rank) is the part of collapse(expand(.)) that
    mixes ranks, exact in the metric of the weights: the preconditioner, with which one step solves that case.
    Conjugate gradients of `steps` steps on |target - expand(x)|^2 + ridge |x|^2.
    """
    level = float(np.trace(gram)) / len(gram)
    precondition = np.linalg.inv(gram + (ridge + (1e-8 * level or 1.0)) * np.eye(len(gram)))
    x = start
    residual = collapse(metric.times(target - expand(x))) - ridge * x
    z = precondition @ residual
    direction, power = z, float(np.vdot(residual, z))
    first = power
    for _ in range(steps):
        moved = collapse(metric.times(expand(direction))) + ridge * direction
        curvature = float(np.vdot(direction, moved))
        if not curvature > 0 or not power > 1e-20 * first:
            break
        x = x + (power / curvature) * direction
        residual = residual - (power / curvature) * moved
        z = precondition @ residual
        before, power = power, float(np.vdot(residual, z))
        direction = z + (power / before) * direction
    return x
