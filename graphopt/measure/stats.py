"""Statistics of latencies: raw samples are kept, everything else is derived from them when asked.

Two kinds of interval, for two purposes. For display, the bootstrap of the median (Efron, 1979), resampling whole
bursts because samples within a burst are not independent. For decisions, the interval between order statistics,
the inversion of the sign test: exact for any noise distribution, which the bootstrap is not for few rounds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist
from typing import Any

import numpy as np

CONFIDENCE = 0.95
_DRAWS = 1000


@dataclass(frozen=True)
class LatencyStats:
    """Latency samples in seconds, in the order they were taken.

    `bursts` are the lengths of the runs of samples that were taken back to back; () when not known.
    Raises ValueError when there are no samples, or one is not positive and finite.
    """

    samples_s: tuple[float, ...]
    bursts: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.samples_s:
            raise ValueError("no latency samples")
        if not all(math.isfinite(s) and s > 0 for s in self.samples_s):
            raise ValueError("latency samples must be positive and finite")
        if self.bursts and (sum(self.bursts) != len(self.samples_s) or min(self.bursts) < 1):
            raise ValueError("burst lengths do not add up to the number of samples")

    @classmethod
    def of_bursts(cls, bursts: Iterable[Sequence[float]]) -> LatencyStats:
        """From one sequence of samples per burst."""
        kept = [tuple(burst) for burst in bursts]
        return cls(tuple(s for burst in kept for s in burst), tuple(len(burst) for burst in kept))

    @cached_property
    def _array(self) -> np.ndarray:
        return np.asarray(self.samples_s)

    @property
    def median_s(self) -> float:
        return float(np.median(self._array))

    @property
    def mean_s(self) -> float:
        return float(self._array.mean())

    @property
    def std_s(self) -> float:
        """Sample standard deviation; 0 for a single sample."""
        return float(self._array.std(ddof=1)) if len(self._array) > 1 else 0.0

    @property
    def min_s(self) -> float:
        return float(self._array.min())

    @property
    def max_s(self) -> float:
        return float(self._array.max())

    def percentile_s(self, percent: float) -> float:
        """Linear interpolation between samples, numpy's default."""
        return float(np.percentile(self._array, percent))

    @property
    def p50_s(self) -> float:
        return self.median_s  # not percentile_s(50), whose interpolation may round the last digit differently

    @property
    def p90_s(self) -> float:
        return self.percentile_s(90)

    @property
    def p95_s(self) -> float:
        return self.percentile_s(95)

    @property
    def p99_s(self) -> float:
        return self.percentile_s(99)

    @cached_property
    def interval_s(self) -> tuple[float, float]:
        """Bootstrap 95 % interval of the median, resampling bursts (single samples where bursts are unknown)."""
        tail = (1 - CONFIDENCE) / 2
        low, high = np.quantile(bootstrap_medians(self, np.random.default_rng(0)), (tail, 1 - tail))
        return float(low), float(high)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: the samples, and for readers without this code what is derived from them."""
        return {
            "median_s": self.median_s, "interval_s": list(self.interval_s), "confidence": CONFIDENCE,
            "mean_s": self.mean_s, "std_s": self.std_s, "min_s": self.min_s, "max_s": self.max_s,
            "p50_s": self.p50_s, "p90_s": self.p90_s, "p95_s": self.p95_s, "p99_s": self.p99_s,
            "samples_s": list(self.samples_s), "bursts": list(self.bursts),
        }  # fmt: skip

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LatencyStats:
        """What `to_dict` wrote; derived figures are computed again, not read."""
        return cls(tuple(float(s) for s in data["samples_s"]), tuple(int(n) for n in data["bursts"]))


@dataclass(frozen=True)
class Ratio:
    """Median of round-by-round ratios with the ends of its interval."""

    median: float
    low: float
    high: float
    rounds: int
    confidence: float = CONFIDENCE

    def __str__(self) -> str:
        return f"{self.median:.3f}x [{self.low:.3f}, {self.high:.3f}]"

    def to_dict(self) -> dict[str, Any]:
        return {
            "median": self.median,
            "interval": [
                self.low if math.isfinite(self.low) else None,
                self.high if math.isfinite(self.high) else None,
            ],
            "rounds": self.rounds,
            "confidence": self.confidence,
        }


def bootstrap_medians(stats: LatencyStats, rng: np.random.Generator, draws: int = _DRAWS) -> np.ndarray:
    """Medians in seconds of `draws` resamples of whole bursts, shape (draws,)."""
    samples = np.asarray(stats.samples_s)
    lengths = np.asarray(stats.bursts if stats.bursts else (1,) * len(samples))
    owner = np.repeat(np.arange(len(lengths)), lengths)
    order = np.argsort(samples, kind="stable")
    ordered, owner = samples[order], owner[order]
    medians = np.empty(draws)
    for draw in range(draws):
        times = np.bincount(rng.integers(0, len(lengths), len(lengths)), minlength=len(lengths))
        weight = np.cumsum(times[owner])
        total = int(weight[-1])
        below, above = np.searchsorted(weight, ((total + 1) // 2, total // 2 + 1))
        medians[draw] = (ordered[below] + ordered[above]) / 2
    return medians


def bootstrap_ratio(ratios: Sequence[float] | np.ndarray, seed: int = 0, draws: int = 2000) -> Ratio:
    """Median of paired ratios, one per round, with its bootstrap 95 % interval. Raises ValueError when empty."""
    values = np.asarray(ratios, dtype=float)
    if values.size == 0:
        raise ValueError("no rounds to take a ratio of")
    rng = np.random.default_rng(seed)
    medians = np.median(values[rng.integers(0, values.size, (draws, values.size))], axis=1)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(medians, (tail, 1 - tail))
    return Ratio(float(np.median(values)), float(low), float(high), int(values.size))


def sign_interval(ratios: Sequence[float] | np.ndarray, alpha: float) -> Ratio:
    """Median with the distribution-free interval [x_(k), x_(n+1-k)] that misses it with probability <= alpha.

    k is the largest rank with 2 P(Binomial(n, 1/2) < k) <= alpha; where even k = 1 is not allowed (too few rounds)
    the interval is unbounded: nothing can be concluded yet.
    """
    values = np.sort(np.asarray(ratios, dtype=float))
    n = int(values.size)
    if n == 0:
        return Ratio(math.nan, -math.inf, math.inf, 0, 1 - alpha)
    rank, tail, allowed = 0, 0, alpha / 2 * 2.0**n if n < 1000 else 0.0
    if n < 1000:
        while rank < n:
            tail += math.comb(n, rank)
            if tail > allowed:
                break
            rank += 1
    else:  # 2^n overflows a float; the normal approximation is good to a rank here, and one rank is given away
        rank = math.floor(n / 2 - NormalDist().inv_cdf(1 - alpha / 2) * math.sqrt(n) / 2) - 1
    median = float(np.median(values))
    if rank < 1:
        return Ratio(median, -math.inf, math.inf, n, 1 - alpha)
    return Ratio(median, float(values[rank - 1]), float(values[n - rank]), n, 1 - alpha)
