"""One convolution for a block: ridge regression of what x lacks of y on patches of x, as strong as the data asks.

With z a patch of x, r = y - x at its middle, s the taps' standard deviations, R the correlations of the taps and B the
covariances of r with z/s,

    G = B (R + k I)^-1     K = identity + G / s      b = E r - (G / s) E z      k = g v / ((1 - g/n) |G|^2 n)

so that k = 0 is least squares, and k = infinity leaves x plus a constant. n: rows; g = tr R (R + k I)^-1, the number of
parameters the data determines; v: mean square left of r, summed over the channels like |G|^2. The equation for k is
MacKay's; it is solved by iterating, which needs one eigensystem of R.

The energy that is lost is what to expect on new data: v (n + g) / (n - g).

Reference: MacKay, "Bayesian Interpolation", Neural Computation 4, 1992, section 4 (k and g); Akaike, "Statistical
Predictor Identification", Ann. Inst. Statist. Math. 22, 1970 (the error on new data).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from graphopt.passes.paired_inputs import PairedMoments

LEAST_RIDGE = 1e-6
"""Moments are summed from float32 products: correlations are not known any better."""
MOST_RIDGE = 1e3
ROUNDS = 100


@dataclass(frozen=True)
class Fit:
    """A convolution with stride 1 that keeps the size: `weights` (C, C, k, k), `bias` (C,), float32."""

    weights: np.ndarray
    bias: np.ndarray
    lost: float
    """The share of y's energy about its mean that is expected to be lost."""
    ridge: float


def fit(moments: PairedMoments, channels: int, kernel: int) -> Fit:
    """Of what `observe_blocks` gathers, for patches at least as large as `kernel` x `kernel`."""
    assert moments.covariance is not None and moments.crossed is not None and moments.first_variance is not None
    taps = _taps(moments.mean.shape[1], channels, kernel)
    covariance, crossed = moments.covariance[0][np.ix_(taps, taps)], moments.crossed[0][:, taps]
    variances = np.maximum(np.diagonal(covariance), 0.0)
    deviations = np.sqrt(variances)
    scale = np.divide(1.0, deviations, out=np.zeros_like(deviations), where=deviations > 0)  # dead taps get no weight
    energy = float(moments.first_variance.sum())
    solved, left, ridge = _regression(covariance * scale * scale[:, None], crossed * scale, energy, moments.rows)
    weights = solved * scale
    bias = moments.first_mean[0] - weights @ moments.mean[0, taps]
    weights = weights.reshape(channels, channels, kernel, kernel)
    weights += identity(channels, kernel)
    middle = np.arange(channels) * kernel**2 + kernel**2 // 2
    whole = energy + float(variances[middle].sum() + 2 * np.diagonal(crossed[:, middle]).sum())  # of y = x + r
    lost = min(1.0, left / whole) if whole > 0 else 0.0
    return Fit(weights.astype(np.float32), bias.astype(np.float32), lost, ridge)


def unfitted(channels: int, kernel: int) -> Fit:
    """The convolution that changes nothing: the right structure where there is no data."""
    return Fit(identity(channels, kernel).astype(np.float32), np.zeros(channels, np.float32), 1.0, np.inf)


def identity(channels: int, kernel: int) -> np.ndarray:
    """(C, C, k, k), float64."""
    weights = np.zeros((channels, channels, kernel, kernel))
    weights[np.arange(channels), np.arange(channels), kernel // 2, kernel // 2] = 1.0
    return weights


def _taps(observed: int, channels: int, kernel: int) -> np.ndarray:
    """Which of the observed taps a kernel has."""
    window = round((observed / channels) ** 0.5)
    start = (window - kernel) // 2
    grid = np.arange(observed).reshape(channels, window, window)
    return grid[:, start : start + kernel, start : start + kernel].reshape(-1)


def _regression(
    correlations: np.ndarray, crossed: np.ndarray, energy: float, rows: int
) -> tuple[np.ndarray, float, float]:
    """G (channels, taps), the energy of r expected to be left on new data, k."""
    values, vectors = np.linalg.eigh(correlations)
    values = np.maximum(values, 0.0)
    turned = crossed @ vectors
    powers = np.square(turned).sum(axis=0)
    ridge = float(np.clip(len(values) / rows, LEAST_RIDGE, MOST_RIDGE))
    for _ in range(ROUNDS):
        before = ridge
        left, free = _left(values, powers, energy, ridge, rows)
        size = float((powers / np.square(values + ridge)).sum())
        wanted = free * left / ((rows - free) * size) if size > 0 else MOST_RIDGE
        ridge = float(np.clip(wanted, LEAST_RIDGE, MOST_RIDGE))
        if abs(ridge - before) <= 1e-3 * before:
            break
    left, free = _left(values, powers, energy, ridge, rows)
    return (turned / (values + ridge)) @ vectors.T, left * (rows + free) / (rows - free), ridge


def _left(values: np.ndarray, powers: np.ndarray, energy: float, ridge: float, rows: int) -> tuple[float, float]:
    """The mean square left of r on the rows seen, and the number of parameters they determine (below `rows`)."""
    left = energy - float((powers * (values + 2 * ridge) / np.square(values + ridge)).sum())
    free = float((values / (values + ridge)).sum())
    return max(left, 0.0), min(free, 0.999 * rows)
