"""A few splits of one layer to choose from, from one that saves little to one that saves much."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from graphopt.passes.low_rank.choose import Candidate, Fitter, Goal, Split, most_exact

LEVELS = 5
"""Most splits of a layer: each is timed, and the steps between them are about a quarter of what is left."""
LEAST_SHARE = 0.25
"""Of a layer's arithmetic: networks bear less only where a layer was far too wide."""


def menu(fitter: Fitter, candidates: Sequence[Sequence[Candidate]], goal: Goal) -> list[Split]:
    """Fitted, mildest first. `candidates`: of each decomposition, cheapest first.

    At each level of arithmetic the split that loses least, of whatever decomposition; one that loses no more than a
    split with more arithmetic takes its place.
    """
    if not fitter.energy > 0:
        return []
    fitted: dict[tuple[str, tuple[int, ...]], Split] = {}
    chosen: list[Split] = []
    for share in np.geomspace(1 / goal.min_saving, min(LEAST_SHARE, 1 / goal.min_saving), LEVELS):
        level: list[Split] = []
        for each in candidates:
            within = [one for one in each if one.macs <= share * fitter.problem.macs * (1 + 1e-9)]
            if not within:
                continue
            best = most_exact(fitter, within)
            key = best.decomposition.NAME, best.rank
            if key not in fitted:
                fitted[key] = fitter.fit(best)
            level.append(fitted[key])
        if not level:
            break
        found = min(level, key=lambda split: (split.lost, split.cost))
        if found in chosen:
            continue
        chosen = [split for split in chosen if split.lost < found.lost or split.cost < found.cost]
        chosen.append(found)
    return chosen
