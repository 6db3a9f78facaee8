"""Weights to symmetric s8 a channel, biases to s32 at scale s_x * s_w."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from graphopt.passes.quantization.ranges import MIN_SCALE

BIAS_LIMIT = 2**30
"""Half of int32: the other half is left to the accumulator."""


@dataclass(frozen=True)
class QuantizedWeights:
    """`weights` int8, shape as given; `scales` float32 (channels,); `bias` int32 (channels,) or None."""

    weights: np.ndarray
    scales: np.ndarray
    bias: np.ndarray | None
    bias_scales: np.ndarray

    def dequantized(self, axis: int) -> np.ndarray:
        """float32 weights as the integer layer sees them."""
        return self.weights.astype(np.float32) * _along(self.scales, axis, self.weights.ndim)


def quantize_weights(
    weights: np.ndarray,
    axis: int,
    bias: np.ndarray | None,
    input_scale: np.float32,
    *,
    limit: int = 127,
    search: bool = False,
) -> QuantizedWeights:
    """Round `weights` (float32, channels along `axis`) to [-limit, limit] with one scale a channel.

    `bias` float32 (channels,). `search` takes the scale of least squared error instead of the largest magnitude.
    A channel of zeros gets the layer's median scale. A scale is raised where `bias` would not fit 32 bits.
    """
    others = tuple(a for a in range(weights.ndim) if a != axis)
    peak = np.abs(weights).max(axis=others).astype(np.float64)
    if search:
        peak = peak * _least_error(weights, axis, peak, limit)
    alive = peak > 0
    typical = float(np.median(peak[alive])) if alive.any() else float(limit)
    scales = np.where(alive, peak, typical) / limit
    if bias is not None:
        scales = np.maximum(scales, np.abs(bias.astype(np.float64)) / (float(input_scale) * BIAS_LIMIT))
    scales = np.maximum(scales, MIN_SCALE).astype(np.float32)
    rounded = np.rint(weights / _along(scales, axis, weights.ndim)).clip(-limit, limit).astype(np.int8)
    bias_scales = (scales * np.float32(input_scale)).astype(np.float32)
    integers = None
    if bias is not None:
        integers = np.rint(bias.astype(np.float64) / bias_scales.astype(np.float64)).astype(np.int32)
    return QuantizedWeights(rounded, scales, integers, bias_scales)


def _least_error(weights: np.ndarray, axis: int, peak: np.ndarray, limit: int) -> np.ndarray:
    """Per channel, the fraction of the peak to quantize over that gives the least squared error."""
    rows = np.moveaxis(weights, axis, 0).reshape(weights.shape[axis], -1).astype(np.float64)
    best = np.full(len(rows), np.inf)
    chosen = np.ones(len(rows))
    for fraction in np.linspace(1.0, 0.7, 31):
        scale = np.where(peak > 0, peak * fraction / limit, 1.0)[:, None]
        error = ((np.rint(rows / scale).clip(-limit, limit) * scale - rows) ** 2).sum(axis=1)
        chosen = np.where(error < best, fraction, chosen)
        best = np.minimum(error, best)
    return chosen


def _along(vector: np.ndarray, axis: int, rank: int) -> np.ndarray:
    shape = [1] * rank
    shape[axis] = -1
    return vector.reshape(shape)
