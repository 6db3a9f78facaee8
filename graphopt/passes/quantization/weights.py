"""Weights to symmetric s8 a channel, biases to s32 at scale s_x * s_w."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from graphopt.passes.quantization.clipping import clip_by_mse
from graphopt.passes.quantization.compensate import round_with_covariance
from graphopt.passes.quantization.learned import learn_rounding
from graphopt.passes.quantization.moments import Moments
from graphopt.passes.quantization.ranges import MIN_SCALE

Rounding = Literal["nearest", "compensated", "learned"]
Clip = Literal["none", "mse"]
BIAS_LIMIT = 2**30
"""Half of int32: the other half is left to the accumulator."""


@dataclass(frozen=True)
class Rounded:
    """`integers` int8, shape of the weights. `shift` float64 (channels,): what rounding takes from the mean output."""

    integers: np.ndarray
    shift: np.ndarray | None = None


def weight_scales(
    weights: np.ndarray,
    axis: int,
    bias: np.ndarray | None,
    input_scale: np.float32,
    limit: int,
    clip: Clip = "none",
) -> np.ndarray:
    """float32 (channels,): the largest magnitude of each channel over `limit`, or less where `clip` says so.

    `weights`: float32, channels along `axis`; `bias` float32 (channels,). A channel of zeros gets the layer's median
    scale. A scale is raised where `bias` would not fit 32 bits.
    """
    rows = np.moveaxis(weights, axis, 0).reshape(weights.shape[axis], -1)
    peak = np.abs(rows).max(axis=1).astype(np.float64)
    alive = peak > 0
    typical = float(np.median(peak[alive])) if alive.any() else float(limit)
    scales = np.where(alive, peak, typical) / limit
    least = np.full(len(peak), MIN_SCALE)
    if bias is not None:
        least = np.maximum(least, np.abs(bias.astype(np.float64)) / (float(input_scale) * BIAS_LIMIT))
    found = np.maximum(scales, least).astype(np.float32)
    return clip_by_mse(rows, found, least.astype(np.float32), limit) if clip == "mse" else found


def round_weights(
    weights: np.ndarray,
    axis: int,
    scales: np.ndarray,
    limit: int,
    groups: int = 1,
    moments: Moments | None = None,
    rounding: Rounding = "compensated",
    correct_bias: bool = True,
) -> Rounded:
    """Round to [-limit, limit]: to nearest, or, with `moments` of the input, for the least error of the output.

    Where `correct_bias` takes back the mean error of the output, its variance alone is what `rounding` minimises;
    elsewhere its mean square.
    """
    rows = np.moveaxis(weights, axis, 0)
    shape = rows.shape
    rows = rows.reshape(groups, shape[0] // groups, -1).astype(np.float64)
    wide = scales.astype(np.float64).reshape(groups, -1)
    norm = None if moments is None else moments.covariance if correct_bias else moments.second_moment
    if norm is None or rounding == "nearest":
        integers = np.rint(rows / wide[..., None]).clip(-limit, limit)
    else:
        integers = (learn_rounding if rounding == "learned" else round_with_covariance)(rows, wide, norm, limit)
    shift = None
    if moments is not None and correct_bias:
        shift = np.einsum("grt,gt->gr", rows - integers * wide[..., None], moments.mean).reshape(-1)
    stored = np.moveaxis(integers.astype(np.int8).reshape(shape), 0, axis)
    return Rounded(np.ascontiguousarray(stored), shift)


def round_bias(bias: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """int32 (channels,) for `bias` (channels,) at float32 `scales` (channels,) = input scale * weight scales."""
    exact = np.rint(bias.astype(np.float64) / scales.astype(np.float64))
    return exact.clip(-(2**31) + 1, 2**31 - 1).astype(np.int32)
