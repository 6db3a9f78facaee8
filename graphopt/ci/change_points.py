"""Where a series of latencies changed its level.

Segments of log latency are chosen so that the squared distances to their means, and a penalty for each change, are
least: the problem of PELT (Killick, Fearnhead and Eckley, "Optimal detection of changepoints with a linear
computational cost", JASA 2012), solved exactly by optimal partitioning (Jackson et al., IEEE Signal Processing Letters
2005), since a history has thousands of commits and not millions. The penalty is 3 log n times the variance of the
noise, which the differences of neighbours tell. Lone outliers are drawn in first, to three standard deviations from the
median of their neighbourhood. A change is then believed only where a permutation test between its two segments says so
too.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SHORTEST = 5
"""Values in a segment: fewer may be outliers, and no test could tell."""
PERMUTATIONS = 1999
NEIGHBOURHOOD = 7
OUTLIER = 3.0
"""Standard deviations."""
SIGNIFICANCE = 0.01
"""Two segments of five values differ by chance, as far as they can, with probability 2/252."""
LEAST_NOISE = 1e-3
"""Standard deviation of log latency; no clock and no machine is better."""


@dataclass(frozen=True)
class Change:
    """The level changes at `index`, the first value of the new level."""

    index: int
    before: float
    """Median of the segment before."""
    after: float
    p_value: float

    @property
    def ratio(self) -> float:
        return self.after / self.before


def change_points(values: Sequence[float], least: float = 0.0, seed: int = 0) -> list[Change]:
    """Changes of level in positive `values`, in order; those of less than the fraction `least` are left out."""
    logs = np.log(np.asarray(values, dtype=float))
    if len(logs) < 2 * SHORTEST:
        return []
    noise = _noise(logs)
    tame = _without_outliers(logs, noise)
    edges = [0, *_partition(tame, 3 * math.log(len(tame)) * noise**2), len(tame)]
    known: dict[tuple[int, int, int], float] = {}
    while len(edges) > 2:  # the least certain goes first: its segments become one for the tests of its neighbours
        sides = list(zip(edges, edges[1:], edges[2:], strict=False))
        for side in sides:
            if side not in known:
                a, b, c = side
                known[side] = _p_value(tame[a:b], tame[b:c], seed)
        worst = max(range(len(sides)), key=lambda k: known[sides[k]])
        if known[sides[worst]] <= SIGNIFICANCE:
            break
        del edges[worst + 1]
    levels = [float(np.exp(np.median(logs[a:b]))) for a, b in itertools.pairwise(edges)]
    found = [
        Change(b, levels[k], levels[k + 1], known[a, b, c])
        for k, (a, b, c) in enumerate(zip(edges, edges[1:], edges[2:], strict=False))
    ]
    return [change for change in found if abs(math.log(change.ratio)) >= math.log1p(least)]


def _noise(logs: np.ndarray) -> float:
    """Standard deviation about the level, whatever the levels: half of the differences' variance, robustly."""
    return max(float(np.median(np.abs(np.diff(logs)))) / (0.6745 * math.sqrt(2)), LEAST_NOISE)


def _without_outliers(logs: np.ndarray, noise: float) -> np.ndarray:
    half = NEIGHBOURHOOD // 2
    around = np.lib.stride_tricks.sliding_window_view(np.pad(logs, half, mode="reflect"), NEIGHBOURHOOD)
    middle = np.median(around, axis=1)
    return np.clip(logs, middle - OUTLIER * noise, middle + OUTLIER * noise)


def _partition(logs: np.ndarray, penalty: float) -> list[int]:
    """The first indices of all segments but the first."""
    n = len(logs)
    sums = np.concatenate([[0.0], np.cumsum(logs)])
    squares = np.concatenate([[0.0], np.cumsum(logs * logs)])
    least = np.full(n + 1, np.inf)  # of the values before each end, all changes paid
    least[0] = -penalty
    last = np.zeros(n + 1, dtype=int)
    for end in range(SHORTEST, n + 1):
        starts = np.arange(end - SHORTEST + 1)
        spread = squares[end] - squares[starts] - (sums[end] - sums[starts]) ** 2 / (end - starts)
        costs = least[starts] + spread
        last[end] = int(costs.argmin())
        least[end] = costs[last[end]] + penalty
    found: list[int] = []
    at = int(last[n])
    while at > 0:
        found.append(at)
        at = int(last[at])
    return found[::-1]


def _p_value(before: np.ndarray, after: np.ndarray, seed: int) -> float:
    """That means lie as far apart when the values are dealt to both segments at random."""
    together = np.concatenate([before, after])
    apart = abs(float(before.mean() - after.mean()))
    rng = np.random.default_rng(seed)
    dealt = rng.permuted(np.repeat(together[None, :], PERMUTATIONS, axis=0), axis=1)
    sums = dealt[:, : len(before)].sum(axis=1)
    others = (together.sum() - sums) / len(after)
    reached = int((np.abs(sums / len(before) - others) >= apart - 1e-12).sum())
    return (1 + reached) / (1 + PERMUTATIONS)
