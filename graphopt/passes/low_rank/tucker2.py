"""k x k as 1x1 to fewer channels, k x k on these, 1x1 back: W[m,c,..] ~ sum_ts U[m,t] G[t,s,..] V[s,c].

Rank (s, t): channels into and out of the core. The core has the original's stride, dilation and padding; the first
layer has no bias, so the zeros that the core pads with are what it makes of zeros.

Reference: Kim et al., "Compression of Deep Convolutional Neural Networks for Fast and Low Power Mobile Applications",
ICLR 2016.
"""

from __future__ import annotations

import numpy as np

from graphopt.passes.low_rank.metric import Metric
from graphopt.passes.low_rank.shared_basis import SharedBasis
from graphopt.passes.low_rank.stages import Rank, Shape, Stage

NAME = "tucker2"


def refuses(shape: Shape) -> str | None:
    """Why a layer has no such form."""
    if np.prod(shape.kernel, dtype=int) == 1:
        return "Tucker-2 needs a kernel larger than 1x1"
    return None


def full(shape: Shape) -> Rank:
    """The ranks that are exact."""
    area = int(np.prod(shape.kernel))
    return (min(shape.inputs, shape.outputs * area), min(shape.outputs, shape.taps))


def stages(shape: Shape, rank: Rank) -> tuple[Stage, ...]:
    """1x1, the core, 1x1."""
    axes = tuple(range(len(shape.kernel)))
    return (Stage(rank[0], shape.inputs), Stage(rank[1], rank[0], axes), Stage(shape.outputs, rank[1]))


class Solver:
    """Fits one layer's `weights` (outputs, inputs, *kernel), at any ranks."""

    def __init__(self, weights: np.ndarray, metric: Metric, seed: int):
        self.shape = Shape(weights.shape[0], weights.shape[1], weights.shape[2:])
        self.shared = SharedBasis(weights.reshape(*weights.shape[:2], -1), metric)

    def error(self, rank: Rank) -> float:
        """At least the energy that ranks lose."""
        return self.shared.start_error(rank[0], rank[1])

    def fit(self, rank: Rank) -> tuple[np.ndarray, ...]:
        """The weights of the stages."""
        found, wanted = self.shared.fit(rank[0], rank[1]), stages(self.shape, rank)
        return tuple(own.reshape(stage.shape(self.shape.kernel)) for own, stage in zip(found, wanted, strict=True))
