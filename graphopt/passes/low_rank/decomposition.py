"""What a decomposition is, and which there are."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from graphopt.passes.low_rank import cp, spatial, svd, tucker2
from graphopt.passes.low_rank.metric import Metric
from graphopt.passes.low_rank.stages import Rank, Shape, Stage


class Solver(Protocol):
    """One group of a layer in one metric. What its ranks have in common is computed once, when it is first wanted."""

    def error(self, rank: Rank) -> float:
        """The energy lost, as far as that can be told without the whole fit."""
        ...

    def fit(self, rank: Rank) -> tuple[np.ndarray, ...]:
        """The stages' weights."""
        ...


class Decomposition(Protocol):
    """One way to write a layer as several; each of the modules beside this one is one."""

    @property
    def NAME(self) -> str: ...

    def refuses(self, shape: Shape) -> str | None:
        """Why a layer of this shape has no such form; None where it has."""
        ...

    def full(self, shape: Shape) -> Rank:
        """The rank (Tucker-2: ranks) from which on it is exact."""
        ...

    def stages(self, shape: Shape, rank: Rank) -> tuple[Stage, ...]:
        """The layers."""
        ...

    def Solver(self, weights: np.ndarray, metric: Metric, seed: int) -> Solver:
        """`weights` of one group, (outputs, inputs, *kernel) float64; `seed` starts what has no other start."""
        ...


DECOMPOSITIONS: dict[str, Decomposition] = {"svd": svd, "spatial": spatial, "tucker2": tucker2, "cp": cp}
AUTOMATIC = ("svd", "spatial", "tucker2")
"""What `auto` chooses from: CP's depthwise lines save arithmetic where processors have the least use for it."""
