"""Which choices to make, and in which order: those that save most for the noise they add, first.

A path is the greedy walk down the lower hull of (cost, noise): every step takes the one choice, new or in place of a
milder one of its site, that saves most for each unit of noise added. Noise energies of different choices add up. So any
point of a path is near the cheapest selection for its noise (the Lagrangian relaxation of a knapsack with choices;
Everett, "Generalized Lagrange Multiplier Method", Operations Research 1963).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from graphopt.search.choices import Choice, Selection, with_choice

MOST_NOISE = 1.0
"""A path ends where the error is as large as the outputs, or the divergence is one nat."""
LEAST_GAIN = 1e-4
"""A choice must save this share of the whole cost."""
Cost = Callable[[Selection], float]


@dataclass(frozen=True)
class Step:
    """A selection on a path: its predicted cost (seconds, or bytes) and the noise its choices add (see sensitivity)."""

    selection: Selection
    cost: float
    noise: float


def path(choices: Sequence[Choice], cost: Cost, finest: float = 0.01) -> list[Step]:
    """From nothing chosen on; steps closer together than `finest` of the cost are left out, but for the last."""
    start = Step({}, cost({}), 0.0)
    steps, now = [start], start
    while (after := _best(choices, now, start.cost, cost)) is not None and after.noise <= MOST_NOISE:
        if after.cost <= steps[-1].cost * (1 - finest):
            steps.append(after)
        now = after
    return steps if now is steps[-1] else [*steps, now]


def _best(choices: Sequence[Choice], now: Step, whole: float, cost: Cost) -> Step | None:
    best: tuple[float, Step] | None = None
    for choice in choices:
        if now.selection.get(choice.place) is choice:
            continue
        selection = with_choice(now.selection, choice)
        if selection is None:
            continue
        step = Step(selection, cost(selection), sum(each.noise for each in selection.values()))
        saved, added = now.cost - step.cost, step.noise - now.noise
        if saved < LEAST_GAIN * whole:
            continue
        worth = saved / max(added, 1e-9)
        if best is None or worth > best[0]:
            best = worth, step
    return None if best is None else best[1]
