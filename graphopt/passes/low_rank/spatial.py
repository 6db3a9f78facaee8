"""kH x kW as kH x 1 to r channels, then 1 x kW: W[m,c,i,j] ~ sum_r H[m,r,j] V[r,c,i].

The vertical layer has the original's stride, dilation and padding along the first axis, the horizontal one those along
the second. It has no bias, so what the second pads with, zero, is what the first makes of zeros.

Reference: Jaderberg et al., "Speeding up Convolutional Neural Networks with Low Rank Expansions", BMVC 2014, scheme 2.
"""

from __future__ import annotations

import numpy as np

from graphopt.passes.low_rank.metric import Metric
from graphopt.passes.low_rank.shared_basis import SharedBasis
from graphopt.passes.low_rank.stages import Rank, Shape, Stage

NAME = "spatial"


def refuses(shape: Shape) -> str | None:
    """Why a layer has no such form."""
    if len(shape.kernel) != 2 or min(shape.kernel) == 1:
        return "a spatial split needs a kernel of more than one row and column"
    return None


def full(shape: Shape) -> Rank:
    """The rank that is exact."""
    return (min(shape.inputs * shape.kernel[0], shape.outputs * shape.kernel[1]),)


def stages(shape: Shape, rank: Rank) -> tuple[Stage, ...]:
    """Vertical, horizontal."""
    return (Stage(rank[0], shape.inputs, (0,)), Stage(shape.outputs, rank[0], (1,)))


class Solver:
    """Fits one layer's `weights` (outputs, inputs, height, width), at any rank."""

    def __init__(self, weights: np.ndarray, metric: Metric, seed: int):
        outputs, inputs, height, width = self.shape = weights.shape
        self.shared = SharedBasis(weights.reshape(outputs, inputs * height, width), metric)

    def error(self, rank: Rank) -> float:
        """At least the energy that a rank loses."""
        return self.shared.start_error(rank[0], self.shape[0])

    def fit(self, rank: Rank) -> tuple[np.ndarray, ...]:
        """The weights of the stages."""
        outputs, inputs, height, width = self.shape
        basis, core, mixing = self.shared.fit(rank[0], outputs)
        vertical = basis.reshape(rank[0], inputs, height, 1)
        return vertical, np.tensordot(mixing, core, 1).reshape(outputs, rank[0], 1, width)
