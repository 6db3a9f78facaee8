"""Pieces of a model to time on their own: of about equal work, cut where few values cross."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

from graphopt.partition.nodes import Nodes

REACH = 4
"""A cut may move by one part in REACH of a piece's work, to where fewer values cross."""


def segments(nodes: Nodes, work: Sequence[float], count: int) -> list[tuple[int, ...]]:
    """At most `count` runs of consecutive nodes that together are all of them. Nodes are sorted, so each is convex."""
    done = list(accumulate(work))
    total = done[-1] if done else 0.0
    crossing = _crossing(nodes)
    cuts = {0, len(nodes.nodes)}
    for number in range(1, count):
        wanted, slack = total * number / count, total / count / REACH
        near = [i + 1 for i, seconds in enumerate(done[:-1]) if abs(seconds - wanted) <= slack]
        if near:
            cuts.add(min(near, key=lambda i: (crossing[i], abs(done[i - 1] - wanted))))
    return [tuple(range(a, b)) for a, b in pairwise(sorted(cuts)) if b > a]


def _crossing(nodes: Nodes) -> list[int]:
    """At position i: how many values are made by nodes before i and read by node i or later ones."""
    last: dict[int, tuple[int, int]] = {}
    makers = {id(value): i for i, node in enumerate(nodes.nodes) for value in node.outputs}
    for reader, values in enumerate(nodes.reads):
        for value in values:
            if id(value) in makers:
                last[id(value)] = makers[id(value)], reader
    change = [0] * (len(nodes.nodes) + 2)
    for made, read in last.values():
        change[made + 1] += 1
        change[read + 1] -= 1
    return list(accumulate(change))
