"""kH x kW as kH x 1 to r channels, then 1 x kW: W[m,c,i,j] ~ sum_r H[m,r,j] V[r,c,i].

The vertical layer has the original's stride, dilation and padding along the first axis, the horizontal one those along
the second. It has no bias, so what the second pads with, zero, is what the first makes of zeros.

Reference: Jaderberg et al., "Speeding up Convolutional Neural Networks with Low Rank Expansions", BMVC 2014, scheme 2.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from graphopt.passes.low_rank.metric import Metric
from graphopt.passes.low_rank.shared_basis import fit_basis, start_errors
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


def errors(weights: np.ndarray, metric: Metric, seed: int) -> Callable[[Rank], float]:
    """At least the energy that a rank loses."""
    start = start_errors(_split(weights), metric)
    return lambda rank: start(rank[0], len(weights))


def fit(weights: np.ndarray, metric: Metric, rank: Rank, seed: int) -> tuple[np.ndarray, ...]:
    """The weights of the stages."""
    outputs, inputs, height, width = weights.shape
    basis, core, mixing = fit_basis(_split(weights), metric, rank[0], outputs)
    vertical = basis.reshape(rank[0], inputs, height, 1)
    return vertical, np.tensordot(mixing, core, 1).reshape(outputs, rank[0], 1, width)


def _split(weights: np.ndarray) -> np.ndarray:
    outputs, inputs, height, width = weights.shape
    return weights.reshape(outputs, inputs * height, width)
