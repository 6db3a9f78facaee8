"""What calibration keeps of a tensor, and the ranges that 8-bit quantization can choose from it.

A tensor is seen a batch at a time and never kept: its extremes, its mean per channel, and a histogram of
`BINS` bins over [-R, R), where R is a power of two that doubles (bins merge in pairs) when a larger value arrives.
So one pass is enough, memory does not depend on the data, and the result does not depend on the batch size.

Range choices: `minmax`; `percentile`, both tails cut at the same rank; `entropy`, the least Kullback-Leibler
divergence between the clipped histogram and its quantized form (Migacz, "8-bit inference with TensorRT", GTC 2017);
`mse`, the least mean squared error of the quantized tensor (Choukroun et al., "Low-bit quantization of neural
networks for efficient inference", 2019), optionally measured after the function that consumes the tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

BINS = 8192
CHUNK = 1 << 16
LANES = 4
"""Histograms that neighbours are counted in by turns: a processor stalls where it adds to one place again and again, as
behind a Relu to that of zero."""
_MIDDLES = (BINS // 2 + BINS * (np.arange(CHUNK) % LANES)).astype(np.float32)
METHODS = ("minmax", "percentile", "entropy", "mse")
Method = Literal["minmax", "percentile", "entropy", "mse"]


@dataclass(frozen=True)
class TensorStatistics:
    """Extremes, histogram and channel means of one tensor over the calibration data.

    `counts`: int64 (BINS,), values other than exact zero; `reach`: R above; `zeros`: how many exact zeros;
    `channel_mean`: float64 (C,) over axis 1 of tensors of rank 2 and more, None otherwise or where C varies.
    `feature_peak`: float64 (K,), the largest magnitude at each index of the last axis, which a matrix product sums
    over, of tensors of rank 1 to 3 (pictures have none, and are large); None otherwise or where K varies.
    """

    minimum: float
    maximum: float
    reach: float
    counts: np.ndarray
    zeros: int
    channel_mean: np.ndarray | None = None
    feature_peak: np.ndarray | None = None

    @property
    def count(self) -> int:
        """How many values were seen."""
        return int(self.counts.sum()) + self.zeros

    @property
    def centres(self) -> np.ndarray:
        """The middle of every bin, float64 (BINS,)."""
        width = 2 * self.reach / BINS
        return -self.reach + width * (np.arange(BINS) + 0.5)

    def range(
        self,
        method: Method = "minmax",
        *,
        percentile: float = 99.99,
        symmetric: bool = False,
        levels: int = 256,
        through: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> tuple[float, float]:
        """The interval (low <= 0 <= high) to quantize over; symmetric means low == -high.

        `percentile`: in (50, 100]. `levels`: of the quantized type. `through`: for `mse`, the elementwise function
        whose output must come out right.
        """
        low, high = min(self.minimum, 0.0), max(self.maximum, 0.0)
        if method == "minmax" or low == high:
            pass
        elif method == "percentile":
            low, high = self._percentile_range(percentile)
        elif method == "entropy":
            low, high = self._entropy_range(levels)
        elif method == "mse":
            return self._mse_range(levels, symmetric, through)
        else:
            raise ValueError(f"unknown method {method!r}")
        if symmetric:
            high = max(-low, high)
            low = -high
        return low, high

    def quantile(self, fraction: float) -> float:
        """The value that this fraction of the values do not exceed, to within one bin."""
        counts = self.counts.astype(np.float64)
        zero_bin = BINS // 2
        counts[zero_bin] += self.zeros
        total = counts.sum()
        if total == 0:
            return 0.0
        cumulative = np.cumsum(counts)
        bin_ = int(np.searchsorted(cumulative, fraction * total, side="left"))
        bin_ = min(bin_, BINS - 1)
        before = cumulative[bin_ - 1] if bin_ else 0.0
        inside = (fraction * total - before) / counts[bin_] if counts[bin_] else 0.0
        width = 2 * self.reach / BINS
        return float(np.clip(-self.reach + width * (bin_ + np.clip(inside, 0, 1)), self.minimum, self.maximum))

    def _percentile_range(self, percentile: float) -> tuple[float, float]:
        tail = (100.0 - percentile) / 100.0
        return min(self.quantile(tail), 0.0), max(self.quantile(1.0 - tail), 0.0)

    def _occupied(self) -> tuple[np.ndarray, np.ndarray]:
        bins = np.flatnonzero(self.counts)
        return np.clip(self.centres[bins], self.minimum, self.maximum), self.counts[bins].astype(np.float64)

    def _entropy_range(self, levels: int) -> tuple[float, float]:
        values, counts = self._occupied()
        low, high = min(self.minimum, 0.0), max(self.maximum, 0.0)
        best, chosen = math.inf, (low, high)
        for shrink in np.linspace(1.0, 0.1, 128):
            divergence = _divergence(values, counts, low * shrink, high * shrink, levels)
            if divergence < best:
                best, chosen = divergence, (low * shrink, high * shrink)
        return chosen

    def _mse_range(
        self, levels: int, symmetric: bool, through: Callable[[np.ndarray], np.ndarray] | None
    ) -> tuple[float, float]:
        values, counts = self._occupied()
        low, high = min(self.minimum, 0.0), max(self.maximum, 0.0)
        target = values if through is None else through(values)

        def error(lo: float, hi: float) -> float:
            scale = (hi - lo) / (levels - 1)
            zero = round(-lo / scale)
            quantized = (np.clip(np.rint(values / scale) + zero, 0, levels - 1) - zero) * scale
            if through is not None:
                quantized = through(quantized)
            difference = quantized - target
            return float(np.dot(counts, difference * difference))

        if symmetric:
            top = max(-low, high)
            high = _best([(-top * s, top * s) for s in np.linspace(1.0, 0.1, 181)], error)[1]
            return -high, high
        steps = np.linspace(1.0, 0.0, 101)[:-1]
        lows = [low * s for s in steps] + ([0.0] if high > 0 else [])
        highs = [high * s for s in steps]
        for _ in range(3):  # coordinate descent: the two ends are nearly independent
            before = (low, high)
            if high > 0:
                low, high = _best([(low, hi) for hi in highs], error)
            if low < 0:
                low, high = _best([(lo, high) for lo in lows], error)
            if (low, high) == before:
                break
        return low, high


def _best(candidates: Sequence[tuple[float, float]], cost: Callable[[float, float], float]) -> tuple[float, float]:
    costs = [cost(*candidate) for candidate in candidates]
    low, high = candidates[int(np.argmin(costs))]
    return float(low), float(high)


def _divergence(values: np.ndarray, counts: np.ndarray, low: float, high: float, levels: int) -> float:
    scale = (high - low) / (levels - 1)
    inside = (values >= low - scale / 2) & (values <= high + scale / 2)
    level = np.clip(np.rint((values - low) / scale), 0, levels - 1).astype(np.int64)
    if not inside.any():
        return math.inf
    clipped = counts[inside].copy()  # outliers pile up in the outermost bins, as clipping does to them
    clipped[0] += counts[values < low - scale / 2].sum()
    clipped[-1] += counts[values > high + scale / 2].sum()
    level = level[inside]
    occupied = np.bincount(level, minlength=levels)
    mass = np.bincount(level, weights=counts[inside], minlength=levels)  # the quantized form never saw the outliers
    flattened = (mass / np.maximum(occupied, 1))[level]
    p, q = clipped / clipped.sum(), flattened / flattened.sum()
    return float(np.sum(p * np.log(p / q)))


class Observer:
    """Collects `TensorStatistics` of one tensor, a batch at a time."""

    def __init__(self) -> None:
        self.minimum = math.inf
        self.maximum = -math.inf
        self.reach = 0.0
        self.counts = np.zeros(BINS, np.int64)
        self.zeros = 0
        self.sums: np.ndarray | None = None
        self.rows = 0
        self.has_channels = True
        self.peaks: np.ndarray | None = None
        self.has_features = True

    def see(self, array: np.ndarray) -> None:
        """Add a batch. Raises ValueError where it is not finite."""
        if array.size == 0:
            return
        low, high = float(array.min()), float(array.max())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError("NaN or infinity")
        self.minimum, self.maximum = min(self.minimum, low), max(self.maximum, high)
        self._stretch(max(-low, high))
        self._count(array)
        self._add_channels(array)
        self._add_features(array)

    def _stretch(self, magnitude: float) -> None:
        if magnitude == 0.0 or magnitude < self.reach:
            return
        wanted = math.ldexp(1.0, math.frexp(magnitude)[1])  # the power of two strictly above
        if self.reach == 0.0:
            self.reach = wanted
            return
        while self.reach < wanted:
            half = BINS // 4
            merged = self.counts.reshape(-1, 2).sum(axis=1)
            self.counts = np.zeros(BINS, np.int64)
            self.counts[half : BINS - half] = merged
            self.reach *= 2

    def _count(self, array: np.ndarray) -> None:
        flat = array.reshape(-1)
        zeros = int(np.count_nonzero(flat == 0))  # of booleans: several times faster than of floats
        self.zeros += zeros
        if self.reach == 0.0:
            return
        if self.reach < 2.0**-100:
            flat = flat.astype(np.float64)  # the factor would overflow float32
        factor = flat.dtype.type(BINS / 2 / self.reach)  # powers of two: this product is exact
        found = np.zeros(LANES * BINS, np.int64)
        for start in range(0, flat.size, CHUNK):  # in cache-sized pieces
            bins = flat[start : start + CHUNK] * factor
            np.floor(bins, out=bins)
            bins += _MIDDLES[: len(bins)]  # whole numbers below 2^24: exact
            found += np.bincount(bins.astype(np.intp), minlength=LANES * BINS)
        self.counts += found.reshape(LANES, BINS).sum(axis=0)
        self.counts[BINS // 2] -= zeros

    def _add_channels(self, array: np.ndarray) -> None:
        if not self.has_channels:
            return
        if array.ndim < 2 or (self.sums is not None and len(self.sums) != array.shape[1]):
            self.has_channels = False
            return
        axes = tuple(axis for axis in range(array.ndim) if axis != 1)
        spatial = array.size // (array.shape[0] * array.shape[1]) if array.shape[0] and array.shape[1] else 0
        if spatial == 0:
            return
        inner = array.reshape(array.shape[0], array.shape[1], spatial).mean(axis=2, dtype=np.float32) if axes else array
        total = inner.sum(axis=0, dtype=np.float64)
        self.sums = total if self.sums is None else self.sums + total
        self.rows += array.shape[0]

    def _add_features(self, array: np.ndarray) -> None:
        if not self.has_features:
            return
        if not 1 <= array.ndim <= 3 or (self.peaks is not None and len(self.peaks) != array.shape[-1]):
            self.has_features = False
            return
        rows = array.reshape(-1, array.shape[-1])
        peaks = np.maximum(rows.max(axis=0), -rows.min(axis=0)).astype(np.float64)
        self.peaks = peaks if self.peaks is None else np.maximum(self.peaks, peaks)

    def statistics(self) -> TensorStatistics:
        """What was seen so far."""
        seen = self.minimum <= self.maximum
        mean = self.sums / self.rows if self.has_channels and self.sums is not None and self.rows else None
        return TensorStatistics(
            self.minimum if seen else 0.0,
            self.maximum if seen else 0.0,
            self.reach or 1.0,
            self.counts.copy(),
            self.zeros,
            mean,
            self.peaks if self.has_features else None,
        )


def merge(parts: Sequence[TensorStatistics]) -> TensorStatistics:
    """The statistics of several tensors laid end to end; what is kept by channel is dropped. `parts` is not empty."""
    if len(parts) == 1:
        return parts[0]
    reach = max(part.reach for part in parts)
    total = np.zeros(BINS, np.int64)
    for part in parts:
        observer = Observer()
        observer.reach, observer.counts = part.reach, part.counts
        while observer.reach < reach:
            observer._stretch(observer.reach)
        total += observer.counts
    return TensorStatistics(
        min(part.minimum for part in parts),
        max(part.maximum for part in parts),
        reach,
        total,
        sum(part.zeros for part in parts),
    )
