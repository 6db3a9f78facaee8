"""How many channels to keep: the rank of a layer's split, and which decomposition it is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product

import numpy as np

from graphopt.passes.low_rank.decomposition import Decomposition, Solver
from graphopt.passes.low_rank.metric import Metric
from graphopt.passes.low_rank.problem import Problem
from graphopt.passes.low_rank.stages import Rank, Stage, balance, compose, macs

MOST_CANDIDATES = 64
"""Of one rank: finer steps would differ by less than two per cent of the full rank."""
NOTHING_TO_KEEP = "its weights are zero, or its inputs never vary"


@dataclass(frozen=True)
class Goal:
    """What a rank has to satisfy. `block`: ranks are multiples of it; `min_saving`: least MACs before over after."""

    energy: float
    ratio: float | None
    block: int
    min_saving: float


@dataclass(frozen=True)
class Candidate:
    """A decomposition at a rank; `macs` for one position of the output, of one group."""

    decomposition: Decomposition
    rank: Rank
    macs: float


@dataclass(frozen=True)
class Split:
    """The layers in place of one. `weights`: of each stage, (groups, *stage's shape) float64.

    `lost`: share of the energy that is lost; `cost`: MACs after over before.
    """

    method: str
    rank: Rank
    stages: tuple[Stage, ...]
    weights: tuple[np.ndarray, ...]
    lost: float
    cost: float

    def product(self) -> np.ndarray:
        """(groups, outputs, inputs, *kernel): the weights of the one layer that they amount to."""
        return np.stack([compose(self.stages, [each[group] for each in self.weights])
                         for group in range(len(self.weights[0]))])  # fmt: skip


def affordable(problem: Problem, decomposition: Decomposition, goal: Goal) -> list[Candidate] | str:
    """Candidates that save enough arithmetic, cheapest first, or why there is none."""
    refusal = decomposition.refuses(problem.shape)
    if refusal is not None:
        return refusal
    # Ranks are counted a group; the channels of all groups together fill the block.
    step = goal.block // math.gcd(goal.block, problem.groups)
    multiples = [_multiples(full, step) for full in decomposition.full(problem.shape)]
    found = [at_rank(problem, decomposition, rank) for rank in product(*multiples)]
    found = [each for each in found if each.macs * goal.min_saving <= problem.macs]
    if not found:
        counted = f"no rank that is a multiple of {goal.block} channels" if goal.block > 1 else "no rank"
        return f"{counted} makes it {goal.min_saving:g} times less arithmetic"
    if goal.ratio is not None:
        found = [each for each in found if each.macs <= goal.ratio * problem.macs]
        if not found:
            return f"no rank leaves it {goal.ratio:g} of its arithmetic or less"
    return sorted(found, key=lambda each: (each.macs, each.rank))


def at_rank(problem: Problem, decomposition: Decomposition, rank: Rank) -> Candidate:
    """What this rank costs."""
    shape = problem.shape
    return Candidate(decomposition, rank, macs(decomposition.stages(shape, rank), shape.kernel, problem.resolution))


class Fitter:
    """A layer in the metrics of its inputs, one a group, with all that its candidates have in common."""

    def __init__(self, problem: Problem, metrics: Sequence[Metric], seed: int):
        self.problem, self.metrics, self.seed = problem, metrics, seed
        self._solvers: dict[tuple[str, bool], list[Solver]] = {}

    @cached_property
    def energy(self) -> float:
        """What the layer's outputs have, all groups together."""
        return self._energy(self.problem.weights)

    def error(self, candidate: Candidate) -> float:
        """The energy it loses, as far as that can be told without the whole fit."""
        return sum(solver.error(candidate.rank) for solver in self._solved(candidate.decomposition, False))

    def fit(self, candidate: Candidate) -> Split:
        """The candidate's weights, for least error."""
        shape, rank = self.problem.shape, candidate.rank
        exact = all(own >= full for own, full in zip(rank, candidate.decomposition.full(shape), strict=True))
        stages = candidate.decomposition.stages(shape, rank)
        groups = [balance(stages, solver.fit(rank)) for solver in self._solved(candidate.decomposition, exact)]
        weights = tuple(np.stack(each) for each in zip(*groups, strict=True))
        cost = candidate.macs / self.problem.macs
        split = Split(candidate.decomposition.NAME, rank, stages, weights, 0.0, cost)
        return replace(split, lost=self._energy(self.problem.weights - split.product()) / self.energy)

    def _energy(self, weights: np.ndarray) -> float:
        rows = weights.reshape(self.problem.groups, self.problem.shape.outputs, -1)
        return sum(metric.energy(each) for each, metric in zip(rows, self.metrics, strict=True))

    def _solved(self, decomposition: Decomposition, exact: bool) -> list[Solver]:
        """Nothing is lost at full rank: then the metric could only add rounding."""
        key = decomposition.NAME, exact
        if key not in self._solvers:
            pairs = zip(self.problem.weights, self.metrics, strict=True)
            self._solvers[key] = [decomposition.Solver(w, Metric() if exact else m, self.seed) for w, m in pairs]
        return self._solvers[key]


def choose(fitter: Fitter, candidates: Sequence[Sequence[Candidate]], goal: Goal) -> Split | str:
    """The best of the candidates of one or more decompositions, fitted; or why none will do.

    For a ratio: of each decomposition the rank with the least error, then the decomposition with the least. For an
    energy: the candidate with the least arithmetic that keeps it.
    """
    if not fitter.energy > 0:
        return NOTHING_TO_KEEP
    if goal.ratio is not None:
        fitted = [fitter.fit(most_exact(fitter, each)) for each in candidates]
        return min(fitted, key=lambda split: (split.lost, split.cost))
    allowed = (1.0 - goal.energy) * fitter.energy
    enough = [found for each in candidates if (found := _cheapest(fitter, each, allowed)) is not None]
    if not enough:
        return f"no rank that saves enough arithmetic keeps {goal.energy:g} of its energy"
    return fitter.fit(min(enough, key=lambda each: each.macs))


def most_exact(fitter: Fitter, candidates: Sequence[Candidate]) -> Candidate:
    """Of the candidates of one decomposition, cheapest first, the one that loses least."""
    if len(candidates[0].rank) == 1:
        return candidates[-1]  # more terms, less error
    return min(candidates, key=lambda each: (fitter.error(each), each.macs))


def _cheapest(fitter: Fitter, candidates: Sequence[Candidate], allowed: float) -> Candidate | None:
    """The first candidate that loses no more than is allowed."""
    if len(candidates[0].rank) > 1:
        return next((each for each in candidates if fitter.error(each) <= allowed), None)
    if fitter.error(candidates[-1]) > allowed:
        return None
    low, high = 0, len(candidates) - 1  # the error falls with the rank
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fitter.error(candidates[middle]) <= allowed else (middle + 1, high)
    return candidates[high]


def _multiples(full: int, step: int) -> list[int]:
    count = full // step
    stride = max(1, -(-count // MOST_CANDIDATES))
    return list(range(step * stride, full + 1, step * stride))
