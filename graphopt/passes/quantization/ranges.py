"""From a range to a scale and zero point, always usable by the engines."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from graphopt.calibration import TensorStatistics, merge
from graphopt.calibration.statistics import Method
from graphopt.passes.quantization.placement import Bounds, Family

MIN_SCALE = 2.0**-60
"""Smaller scales come close to denormals once multiplied into a bias scale; engines refuse zero."""


@dataclass(frozen=True)
class Encoding:
    """value = scale * (integer - zero_point); scale float32, integer of `dtype`."""

    scale: np.float32
    zero_point: int
    dtype: np.dtype

    @property
    def limits(self) -> tuple[int, int]:
        """The least and greatest integer."""
        info = np.iinfo(self.dtype)
        return int(info.min), int(info.max)


def encode_range(low: float, high: float, dtype: np.dtype, bounds: Bounds = (-np.inf, np.inf)) -> Encoding:
    """Scale and zero point of 256 levels over [low, high] extended to hold 0, which is exactly representable.

    With finite `bounds` nothing outside them is representable, so that saturation replaces the clip. An empty range
    has scale 1.
    """
    low, high = max(min(low, 0.0), bounds[0]), min(max(high, 0.0), bounds[1])
    if low == high:
        return Encoding(np.float32(1.0), int(np.iinfo(dtype).min), dtype)
    scale = max((high - low) / 255.0, MIN_SCALE)
    zero = int(np.clip(np.rint(-low / scale), 0, 255))
    if np.isfinite(bounds[0]) and zero > 0:
        scale = min(scale, -bounds[0] / zero)
    if np.isfinite(bounds[1]) and zero < 255:
        scale = min(scale, bounds[1] / (255 - zero))
    rounded = np.float32(max(scale, MIN_SCALE))
    while np.isfinite(bounds[1]) and zero < 255 and rounded * np.float32(255 - zero) > np.float32(bounds[1]):
        rounded = np.nextafter(rounded, np.float32(0))
    while np.isfinite(bounds[0]) and zero > 0 and rounded * np.float32(-zero) < np.float32(bounds[0]):
        rounded = np.nextafter(rounded, np.float32(0))
    return Encoding(rounded, zero + int(np.iinfo(dtype).min), dtype)


def encode_family(
    family: Family, statistics: dict[str, TensorStatistics], method: Method, percentile: float, dtype: np.dtype
) -> Encoding:
    """The one encoding of a family of values, from the statistics of its roots."""
    seen = merge([statistics[str(value.name)] for value in family.roots])
    low, high = seen.range(method, percentile=percentile, through=family.through)
    return encode_range(low, high, dtype, family.bounds)
