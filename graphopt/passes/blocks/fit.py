"""One convolution for a block: ridge regression of what x lacks of y on patches of x, as strong as the data asks.

With z a patch of x and r = y - x at its middle, K = identity + G and b = E r - G E z; G is the regression of r on z
(passes/ridge.py). The energy that is lost is what to expect on new data.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from graphopt.passes.paired_inputs import PairedMoments
from graphopt.passes.ridge import regress


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
    energy = float(moments.first_variance.sum())
    found = regress(covariance, crossed, energy, moments.rows)
    bias = moments.first_mean[0] - found.weights @ moments.mean[0, taps]
    weights = found.weights.reshape(channels, channels, kernel, kernel)
    weights += identity(channels, kernel)
    middle = np.arange(channels) * kernel**2 + kernel**2 // 2
    whole = energy + float(variances[middle].sum() + 2 * np.diagonal(crossed[:, middle]).sum())  # of y = x + r
    lost = min(1.0, found.left / whole) if whole > 0 else 0.0
    return Fit(weights.astype(np.float32), bias.astype(np.float32), lost, found.ridge)


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
