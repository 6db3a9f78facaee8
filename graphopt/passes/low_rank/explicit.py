"""Splits named one by one: NODE:RANK or NODE:METHOD:RANK, where a rank is a number, or INxOUT for Tucker-2."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from graphopt.passes.low_rank.choose import Candidate, Goal, at_rank
from graphopt.passes.low_rank.decomposition import DECOMPOSITIONS, Decomposition
from graphopt.passes.low_rank.problem import Problem
from graphopt.passes.low_rank.stages import Rank


@dataclass(frozen=True)
class Named:
    """One layer's split, as asked for; no `method`: that of the pass, or what the rank's form says."""

    method: str | None
    rank: Rank


def parse(texts: Iterable[str]) -> dict[str, Named]:
    """By node. Raises ValueError.

    Of a node whose name itself ends in `:svd` or the like, the method has to be said.
    """
    found: dict[str, Named] = {}
    for text in texts:
        before, _, rank = text.rpartition(":")
        node, _, method = before.rpartition(":")
        if not node or method not in DECOMPOSITIONS:
            node, method = before, None
        numbers = rank.split("x")
        if not node or len(numbers) > 2 or not all(number.isdecimal() and int(number) > 0 for number in numbers):
            raise ValueError(
                f"ranks: {text!r} is not NODE:RANK or NODE:METHOD:RANK (a rank: a number, or INxOUT for tucker2)"
            )
        if node in found:
            raise ValueError(f"ranks: {node!r} is named twice")
        found[node] = Named(method, tuple(int(number) for number in numbers))
    return found


def text_of(rank: Rank) -> str:
    """As `parse` reads it."""
    return "x".join(map(str, rank))


def candidate_of(problem: Problem, named: Named, method: str, goal: Goal) -> Candidate | str:
    """What is asked for, or why it is not done; `method`: the pass's."""
    decomposition = _decomposition(problem, named, method)
    refusal = decomposition.refuses(problem.shape)
    if refusal is not None:
        return refusal
    full = decomposition.full(problem.shape)
    if len(named.rank) != len(full):
        plural = "s" if len(full) > 1 else ""
        return f"{decomposition.NAME} has {len(full)} rank{plural}, {len(named.rank)} given"
    rank = tuple(min(a, b) for a, b in zip(named.rank, full, strict=True))
    candidate = at_rank(problem, decomposition, rank)
    if candidate.macs * goal.min_saving > problem.macs:
        saving = problem.macs / candidate.macs
        return (
            f"rank {text_of(named.rank)} makes it {saving:.2f} times less arithmetic, {goal.min_saving:g} is asked for"
        )
    return candidate


def _decomposition(problem: Problem, named: Named, method: str) -> Decomposition:
    if named.method is not None:
        return DECOMPOSITIONS[named.method]
    if method != "auto":
        return DECOMPOSITIONS[method]
    pointwise = np.prod(problem.shape.kernel, dtype=int) == 1
    two_dimensional = len(problem.shape.kernel) == 2
    return DECOMPOSITIONS[
        "tucker2" if len(named.rank) == 2 else "spatial" if two_dimensional and not pointwise else "svd"
    ]
