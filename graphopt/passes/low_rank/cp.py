"""k x k as 1x1, one depthwise line an axis, 1x1: W[m,c,i,j] ~ sum_r A[m,r] B[r,c] U[r,i] V[r,j].

Alternating least squares: A is a regression in closed form, B and the lines take a few conjugate gradients. Terms that
grow against each other without end (the sum has no best approximation of a given rank) are kept small by a penalty on
the factors, which share their norms equally after every sweep. From min(taps, ...) terms on the sum is exact.

Reference: Lebedev et al., "Speeding-up Convolutional Neural Networks Using Fine-tuned CP-Decomposition", ICLR 2015;
Phan et al., "Stable Low-Rank Tensor Decomposition for Compression of Convolutional Neural Network", ECCV 2020 (the
terms that diverge).
"""

from __future__ import annotations

import numpy as np

from graphopt.passes.low_rank.metric import Metric, descend
from graphopt.passes.low_rank.stages import Rank, Shape, Stage
from graphopt.passes.low_rank.svd import components

NAME = "cp"
SWEEPS = 40
FEW_SWEEPS = 10
STEPS = 4
PENALTY = 1e-6
"""Of the factors' squares, as a share of the weights' energy per term."""
ENOUGH = 1e-3
"""A sweep that lowers the error by less than this share is the last."""


def refuses(shape: Shape) -> str | None:
    """Why a layer has no such form."""
    if np.prod(shape.kernel, dtype=int) == 1:
        return "CP needs a kernel larger than 1x1"
    return None


def full(shape: Shape) -> Rank:
    """A rank that is surely exact: all products of indices but the longest one's."""
    sizes = (shape.outputs, shape.inputs, *shape.kernel)
    return (int(np.prod(sizes)) // max(shape.outputs, shape.inputs),)


def stages(shape: Shape, rank: Rank) -> tuple[Stage, ...]:
    """1x1, a depthwise line along each axis with a kernel, 1x1."""
    flat = tuple(axis for axis, k in enumerate(shape.kernel) if k == 1)  # they may stride: the first line does it
    long = [axis for axis, k in enumerate(shape.kernel) if k > 1]
    lines = [Stage(rank[0], 1, (axis, *(flat if axis == long[0] else ())), depthwise=True) for axis in long]
    return (Stage(rank[0], shape.inputs), *lines, Stage(shape.outputs, rank[0]))


class Solver:
    """Fits one layer's `weights` (outputs, inputs, *kernel), at any rank."""

    def __init__(self, weights: np.ndarray, metric: Metric, seed: int):
        self.shape = Shape(weights.shape[0], weights.shape[1], weights.shape[2:])
        self.weights, self.metric, self.seed = _without_flat_axes(weights), metric, seed

    def error(self, rank: Rank) -> float:
        """About the energy that a rank loses: of a fit with fewer sweeps."""
        factors = _alternate(self.weights, self.metric, rank[0], self.seed, FEW_SWEEPS)
        rows = self.weights.reshape(len(self.weights), -1)
        return self.metric.energy(rows - factors[0] @ _design(factors[1:]))

    def fit(self, rank: Rank) -> tuple[np.ndarray, ...]:
        """The weights of the stages."""
        if rank[0] >= full(self.shape)[0]:
            mixing, *factors = _exact(self.weights)
            extra = rank[0] - mixing.shape[1]
            mixing = np.pad(mixing, ((0, 0), (0, extra)))
            factors = [np.pad(factor, ((0, extra), (0, 0))) for factor in factors]
        else:
            mixing, *factors = _alternate(self.weights, self.metric, rank[0], self.seed, SWEEPS)
        found, wanted = (*factors, mixing), stages(self.shape, rank)
        return tuple(own.reshape(stage.shape(self.shape.kernel)) for own, stage in zip(found, wanted, strict=True))


def _without_flat_axes(weights: np.ndarray) -> np.ndarray:
    return weights.reshape(*weights.shape[:2], *(k for k in weights.shape[2:] if k > 1))


def _alternate(weights: np.ndarray, metric: Metric, rank: int, seed: int, sweeps: int) -> list[np.ndarray]:
    """A (M, rank), then a factor (rank, n) for the inputs and for each axis of the kernel."""
    outputs = len(weights)
    target = weights.reshape(outputs, -1)
    penalty = PENALTY * metric.energy(target) / rank
    factors = _start(weights, rank, seed)
    mixing = np.zeros((outputs, rank))
    best: tuple[float, list[np.ndarray]] | None = None
    for _ in range(sweeps):
        design = _design(factors)
        through = metric.times(design)
        mixing = np.linalg.solve(through @ design.T + _ridge(through, design, penalty), through @ target.T).T
        left = metric.energy(target - mixing @ design)
        if best is not None and left > best[0] * (1 - ENOUGH):
            if left < best[0]:
                best = (left, [mixing, *factors])
            break
        best = (left, [mixing, *factors])
        for index in range(len(factors)):
            factors = _improve(target, metric, mixing, factors, index, penalty)
        factors = _even(mixing, factors)
    assert best is not None
    return best[1]


def _ridge(through: np.ndarray, design: np.ndarray, penalty: float) -> np.ndarray:
    """The penalty, and as much as keeps the inverse finite."""
    level = float(np.vdot(through, design)) / len(design)
    return (penalty + 1e-9 * level) * np.eye(len(design))


def _improve(
    target: np.ndarray, metric: Metric, mixing: np.ndarray, factors: list[np.ndarray], index: int, penalty: float
) -> list[np.ndarray]:
    """The factors with one of them improved, the others fixed."""

    def changed(own: np.ndarray) -> list[np.ndarray]:
        return [own if position == index else each for position, each in enumerate(factors)]

    sizes = [each.shape[1] for each in factors]
    others = np.ones((len(factors[0]), *(1,) * len(sizes)))
    gram = mixing.T @ mixing
    for position, each in enumerate(factors):
        if position != index:
            others = others * each.reshape(-1, *(size if p == position else 1 for p, size in enumerate(sizes)))
            gram = gram * (each @ each.T)
    axes = tuple(1 + position for position in range(len(sizes)) if position != index)

    def collapse(error: np.ndarray) -> np.ndarray:
        return ((mixing.T @ error).reshape(-1, *sizes) * others).sum(axis=axes)

    def expand(own: np.ndarray) -> np.ndarray:
        return mixing @ _design(changed(own))

    return changed(descend(factors[index], expand, collapse, gram, target, metric, STEPS, penalty))


def _design(factors: list[np.ndarray]) -> np.ndarray:
    """(rank, taps): each term's pattern over the taps."""
    pattern = factors[0]
    for factor in factors[1:]:
        pattern = (pattern[:, :, None] * factor[:, None, :]).reshape(len(factor), -1)
    return pattern


def _even(mixing: np.ndarray, factors: list[np.ndarray]) -> list[np.ndarray]:
    """Every term's factors with equal norms (the first factor, A, follows by regression)."""
    norms = np.stack([np.linalg.norm(mixing, axis=0), *(np.linalg.norm(each, axis=1) for each in factors)])
    norms = np.maximum(norms, np.finfo(np.float64).tiny ** 0.5)
    share = np.exp(np.log(norms).mean(axis=0))
    return [each * (share / norm)[:, None] for each, norm in zip(factors, norms[1:], strict=True)]


def _start(weights: np.ndarray, rank: int, seed: int) -> list[np.ndarray]:
    """Singular vectors of every unfolding but the outputs', then random ones."""
    rng = np.random.default_rng((seed, rank, *weights.shape))
    factors = []
    for axis in range(1, weights.ndim):
        rows = np.moveaxis(weights, axis, 0).reshape(weights.shape[axis], -1)
        vectors = components(rows, Metric())[1].T
        more = rng.standard_normal((max(0, rank - len(vectors)), len(rows)))
        more /= np.linalg.norm(more, axis=1, keepdims=True)
        factors.append(np.concatenate([vectors, more])[:rank])
    return factors


def _exact(weights: np.ndarray) -> list[np.ndarray]:
    """One term for every index of all but the longer of outputs and inputs."""
    outputs, inputs, *kernel = weights.shape
    area = int(np.prod(kernel))
    lines = [each.reshape(area, -1) for each in _unit_lines(kernel)]
    if outputs >= inputs:
        count = inputs
        mixing, first = weights.reshape(outputs, -1), np.repeat(np.eye(inputs), area, axis=0)
    else:
        count = outputs
        mixing = np.repeat(np.eye(outputs), area, axis=1)
        first = weights.reshape(outputs, inputs, area).transpose(0, 2, 1).reshape(outputs * area, inputs)
    return [mixing, first, *(np.tile(line, (count, 1)) for line in lines)]


def _unit_lines(kernel: list[int]) -> list[np.ndarray]:
    """For each axis a unit vector along it, for every position of the kernel."""
    index = np.unravel_index(np.arange(int(np.prod(kernel))), kernel)
    return [np.eye(size)[own] for size, own in zip(kernel, index, strict=True)]
