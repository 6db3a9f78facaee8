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

from graphopt.passes.second_order import in_order, inverse_factors, permuted


def round_with_covariance(weights: np.ndarray, scales: np.ndarray, covariance: np.ndarray, limit: int) -> np.ndarray:
    """Integers (groups, rows, taps) for `weights` of that shape, float; `scales` (groups, rows).

    `covariance`: (groups, taps, taps), of the inputs. Values are within [-limit, limit].
    """
    variance = np.diagonal(covariance, axis1=1, axis2=2)
    order = np.argsort(-variance, axis=1, kind="stable")  # large variances first: most is left to make up for them
    integers = np.empty(weights.shape, np.int64)

    def nearest(tap: int, left: np.ndarray) -> np.ndarray:
        integers[..., tap] = np.rint(left[..., tap] / scales).clip(-limit, limit)
        return integers[..., tap] * scales

    arranged = np.take_along_axis(weights, order[:, None, :], 2)
    in_order(arranged, inverse_factors(permuted(covariance, order)), nearest)
    return np.take_along_axis(integers, np.argsort(order, axis=1)[:, None, :], 2)
