"""Learned rounding: which of its neighbours on the grid each weight becomes is optimised for the layer's output.

AdaRound's problem, a layer at a time: choose integers q that minimise (w - s q) C (w - s q)' for every output channel,
C the covariance of the layer's input (the second moment, where the mean error of the output is not taken back by the
bias). The paper relaxes it and descends by gradient on samples. The objective needs of the samples only C, and along
one weight its discrete minimum is known in closed form, so it is descended here a weight at a time until no single
change helps: no learning rate, no annealing, and every step lowers the objective. It starts, for each channel, from the
better of rounding to nearest and compensated rounding, so it ends no worse than either in the damped norm it descends,
and a channel that is worse than nearest without the damping falls back to it.

Reference: Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", ICML 2020, equations 13 and 20.
"""

from __future__ import annotations

import numpy as np

from graphopt.passes.quantization.compensate import round_with_covariance
from graphopt.passes.second_order import DAMPING, LAZY, output_error

MOST_SWEEPS = 1000
"""Times each weight is looked at; descent ends by itself, mostly after 5 to 20; saturated weights make it slow."""
LEAST_GAIN = 1e-9
"""Relative gain below which a change is a tie and not made: descent must end."""


def learn_rounding(weights: np.ndarray, scales: np.ndarray, covariance: np.ndarray, limit: int) -> np.ndarray:
    """Integers (groups, rows, taps) for `weights` of that shape, float; `scales` (groups, rows).

    `covariance`: (groups, taps, taps), of the inputs. Values are within [-limit, limit].
    """
    covariance = (covariance + covariance.transpose(0, 2, 1)) / 2
    level = np.diagonal(covariance, axis1=1, axis2=2).mean(axis=1)
    damped = covariance + (DAMPING * np.maximum(level, 0.0))[:, None, None] * np.eye(covariance.shape[1])
    nearest = np.rint(weights / scales[..., None]).clip(-limit, limit)
    compensated = round_with_covariance(weights, scales, covariance, limit)
    start = _better(compensated, nearest, weights, scales, damped)
    learned = _descend(start, weights, scales, damped, limit)
    return _better(learned, nearest, weights, scales, covariance).astype(np.int64)


def output_noise(integers: np.ndarray, weights: np.ndarray, scales: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    """(groups, rows): the variance that rounding adds to every output channel."""
    return output_error(weights - integers * scales[..., None], covariance)


def _better(
    first: np.ndarray, second: np.ndarray, weights: np.ndarray, scales: np.ndarray, covariance: np.ndarray
) -> np.ndarray:
    wins = output_noise(first, weights, scales, covariance) < output_noise(second, weights, scales, covariance)
    return np.where(wins[..., None], first, second)


def _descend(
    start: np.ndarray, weights: np.ndarray, scales: np.ndarray, covariance: np.ndarray, limit: int
) -> np.ndarray:
    integers = start.astype(np.float64)
    error = weights - integers * scales[..., None]
    slope = error @ covariance  # half the gradient of the objective by the errors
    taps = weights.shape[2]
    for _ in range(MOST_SWEEPS):
        moved = False
        for first in range(0, taps, LAZY):
            block = slice(first, min(first + LAZY, taps))
            steps = _descend_block(integers, error, slope[..., block].copy(), weights, scales, covariance, limit, block)
            if steps.any():
                slope += steps @ covariance[:, block, :]
                moved = True
        if not moved:
            break
    return integers


def _descend_block(
    integers: np.ndarray,
    error: np.ndarray,
    slope: np.ndarray,
    weights: np.ndarray,
    scales: np.ndarray,
    covariance: np.ndarray,
    limit: int,
    block: slice,
) -> np.ndarray:
    """One look at each weight of a block, in place in `integers` and `error`; returns what `error` changed by."""
    steps = np.zeros_like(slope)
    for offset, tap in enumerate(range(block.start, block.stop)):
        curvature = covariance[:, tap, tap, None]
        now = error[..., tap]
        lowest = now - np.divide(slope[..., offset], curvature, out=np.zeros_like(now), where=curvature > 0)
        best = np.rint((weights[..., tap] - lowest) / scales).clip(-limit, limit)
        then = weights[..., tap] - best * scales
        gains = np.abs(then - lowest) < np.abs(now - lowest) * (1 - LEAST_GAIN)
        step = np.where(gains & (curvature > 0), then - now, 0.0)
        if not step.any():
            continue
        integers[..., tap] = np.where(step != 0, best, integers[..., tap])
        error[..., tap] += step
        slope += step[..., None] * covariance[:, None, tap, block]
        steps[..., offset] = step
    return steps
