"""Rounding weights so that a layer's output, not its weights, comes out right.

With a layer's input x of mean m and covariance C, rounding w to w + d changes the output by d.x: a mean of d.m, which
the bias takes back exactly, and a variance of d C d', which rounding a weight at a time reduces: the error of each is
spread over the weights not yet rounded, in the least-squares sense. With C = I this is rounding to nearest.

Reference: Frantar and Alistarh, "Optimal Brain Compression", NeurIPS 2022, and Frantar et al., "GPTQ", ICLR 2023 (the
order-fixed form by Cholesky factors used here); Nagel et al., "Data-Free Quantization Through Weight Equalization and
Bias Correction", ICCV 2019 (the bias).
"""

from __future__ import annotations

import numpy as np

DAMPING = 0.01
"""Share of the mean variance added to every variance, so that the covariance can be inverted."""


def round_with_covariance(weights: np.ndarray, scales: np.ndarray, covariance: np.ndarray, limit: int) -> np.ndarray:
    """Integers (groups, rows, taps) for `weights` of that shape, float; `scales` (groups, rows).

    `covariance`: (groups, taps, taps), of the inputs. Values are within [-limit, limit].
    """
    variance = np.diagonal(covariance, axis1=1, axis2=2)
    order = np.argsort(-variance, axis=1, kind="stable")  # large variances first: most is left to make up for them
    sorted_ = np.take_along_axis(np.take_along_axis(covariance, order[:, :, None], 1), order[:, None, :], 2)
    level = variance.mean(axis=1)
    upper = np.stack([_factor(each, float(mean)) for each, mean in zip(sorted_, level, strict=True)])
    arranged = np.take_along_axis(weights, order[:, None, :], 2)
    rounded = _round_in_order(arranged, scales, upper, limit)
    return np.take_along_axis(rounded, np.argsort(order, axis=1)[:, None, :], 2)


def _factor(covariance: np.ndarray, level: float) -> np.ndarray:
    """The upper Cholesky factor of the damped covariance's inverse, (taps, taps); `level` is the mean variance.

    A covariance measured on few samples, or of inputs whose mean is large against their variance, may have negative
    eigenvalues of more than the damping: then it is damped more, in the end so much that rounding is to nearest.
    """
    taps = len(covariance)
    if not level > 0:
        return np.eye(taps)
    for damping in (DAMPING, 10 * DAMPING, 100 * DAMPING):
        try:
            return np.linalg.cholesky(np.linalg.inv(covariance + damping * level * np.eye(taps))).T
        except np.linalg.LinAlgError:
            continue
    return np.eye(taps)


BLOCK = 64


def _round_in_order(weights: np.ndarray, scales: np.ndarray, upper: np.ndarray, limit: int) -> np.ndarray:
    left = weights.astype(np.float64)  # what is still to be represented: changes as errors are spread
    integers = np.empty(left.shape, np.int64)
    taps = left.shape[2]
    for start in range(0, taps, BLOCK):
        stop = min(start + BLOCK, taps)
        errors = np.empty((*left.shape[:2], stop - start))
        for tap in range(start, stop):
            integers[..., tap] = np.rint(left[..., tap] / scales).clip(-limit, limit)
            error = (left[..., tap] - integers[..., tap] * scales) / upper[:, tap, tap, None]
            errors[..., tap - start] = error
            left[..., tap + 1 : stop] -= error[..., None] * upper[:, tap, None, tap + 1 : stop]
        left[..., stop:] -= errors @ upper[:, start:stop, stop:]
    return integers
