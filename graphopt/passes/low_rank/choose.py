"""How many channels to keep: the rank of a layer's split, and which decomposition it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from graphopt.passes.low_rank.decomposition import Decomposition
from graphopt.passes.low_rank.metric import Metric
from graphopt.passes.low_rank.problem import Problem
from graphopt.passes.low_rank.stages import Rank, Stage, balance, compose, macs

MOST_CANDIDATES = 64
"""Of one rank: finer steps would differ by less than two per cent of the full rank."""


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


def choose(
    problem: Problem, candidates: Sequence[Sequence[Candidate]], metrics: Sequence[Metric], goal: Goal, seed: int
) -> Split | str:
    """The best of the candidates of one or more decompositions, fitted; or why none will do.

    For a ratio: of each decomposition the rank with the least error, then the decomposition with the least. For an
    energy: the candidate with the least arithmetic that keeps it.
    """
    total = energy(problem, metrics)
    if not total > 0:
        return "its weights are zero, or its inputs never vary"
    if goal.ratio is not None:
        fitted = [fit(problem, _most_exact(problem, each, metrics, seed), metrics, seed) for each in candidates]
        return min(fitted, key=lambda split: (split.lost, split.cost))
    allowed = (1.0 - goal.energy) * total
    enough = [found for each in candidates if (found := _cheapest(problem, each, metrics, allowed, seed)) is not None]
    if not enough:
        return f"no rank that saves enough arithmetic keeps {goal.energy:g} of its energy"
    return fit(problem, min(enough, key=lambda each: each.macs), metrics, seed)


def fit(problem: Problem, candidate: Candidate, metrics: Sequence[Metric], seed: int) -> Split:
    """The candidate's weights, for least error in these metrics, one a group."""
    shape, rank = problem.shape, candidate.rank
    exact = all(own >= full for own, full in zip(rank, candidate.decomposition.full(shape), strict=True))
    stages = candidate.decomposition.stages(shape, rank)
    groups = []
    for weights, metric in zip(problem.weights, metrics, strict=True):
        # Nothing is lost at full rank: then the metric could only add rounding.
        factors = candidate.decomposition.fit(weights, Metric() if exact else metric, rank, seed)
        groups.append(balance(stages, factors))
    split = Split(
        candidate.decomposition.NAME,
        rank,
        stages,
        tuple(np.stack(each) for each in zip(*groups, strict=True)),
        0.0,
        candidate.macs / problem.macs,
    )
    left = (problem.weights - split.product()).reshape(problem.groups, shape.outputs, -1)
    lost = sum(metric.energy(rows) for rows, metric in zip(left, metrics, strict=True))
    return Split(split.method, rank, stages, split.weights, lost / energy(problem, metrics), split.cost)


def energy(problem: Problem, metrics: Sequence[Metric]) -> float:
    """What the layer's outputs have, all groups together."""
    rows = problem.weights.reshape(problem.groups, problem.shape.outputs, -1)
    return sum(metric.energy(each) for each, metric in zip(rows, metrics, strict=True))


def _errors(
    problem: Problem, decomposition: Decomposition, metrics: Sequence[Metric], seed: int
) -> Callable[[Rank], float]:
    each = [decomposition.errors(w, metric, seed) for w, metric in zip(problem.weights, metrics, strict=True)]
    return lambda rank: sum(error(rank) for error in each)


def _most_exact(problem: Problem, candidates: Sequence[Candidate], metrics: Sequence[Metric], seed: int) -> Candidate:
    if len(candidates[0].rank) == 1:
        return candidates[-1]  # more terms, less error
    error = _errors(problem, candidates[0].decomposition, metrics, seed)
    return min(candidates, key=lambda each: (error(each.rank), each.macs))


def _cheapest(
    problem: Problem, candidates: Sequence[Candidate], metrics: Sequence[Metric], allowed: float, seed: int
) -> Candidate | None:
    """The first candidate that loses no more than is allowed."""
    error = _errors(problem, candidates[0].decomposition, metrics, seed)
    if len(candidates[0].rank) > 1:
        return next((each for each in candidates if error(each.rank) <= allowed), None)
    if error(candidates[-1].rank) > allowed:
        return None
    low, high = 0, len(candidates) - 1  # the error falls with the rank
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if error(candidates[middle].rank) <= allowed else (middle + 1, high)
    return candidates[high]


def _multiples(full: int, step: int) -> list[int]:
    count = full // step
    stride = max(1, -(-count // MOST_CANDIDATES))
    return list(range(step * stride, full + 1, step * stride))
