"""A few splits of one layer to choose from, from one that saves little to one that saves much."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from graphopt.passes.low_rank.choose import Candidate, Fitter, Goal, most_exact

LEVELS = 5
"""Most splits of a layer: each is timed, and the steps between them are about a quarter of what is left."""
LEAST_SHARE = 0.25
"""Of a layer's arithmetic: networks bear less only where a layer was far too wide."""


def menu(fitter: Fitter, candidates: Sequence[Sequence[Candidate]], goal: Goal) -> list[Candidate]:
    """Mildest first. `candidates`: of each decomposition, cheapest first.

    At each level of arithmetic the one that loses least, of whatever decomposition, as far as that can be told without
    a fit; one that loses no more than another with more arithmetic takes its place.
    """
    if not fitter.energy > 0:
        return []
    chosen: dict[Candidate, float] = {}
    for share in np.geomspace(1 / goal.min_saving, min(LEAST_SHARE, 1 / goal.min_saving), LEVELS):
        within = [[one for one in each if one.macs <= share * fitter.problem.macs * (1 + 1e-9)] for each in candidates]
        level = {best: fitter.error(best) for best in (most_exact(fitter, each) for each in within if each)}
        if not level:
            break
        found = min(level, key=lambda each: (level[each], each.macs))
        if found not in chosen:
            chosen = {c: lost for c, lost in chosen.items() if lost < level[found] or c.macs < found.macs}
            chosen[found] = level[found]
    return list(chosen)
