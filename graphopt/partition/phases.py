"""The fewest parts: nodes of two kinds in an acyclic graph, run kind by kind.

Parts run one after another, and a part holds nodes of one kind, not necessarily connected. A path that goes from one
kind to the other k times needs k + 1 parts at least. Putting each node into the earliest part that its predecessors
and its kind allow needs no more than the longest such path does, so nothing needs fewer. Each part is convex: a path
that leaves it for a later part cannot come back.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence


def fewest_parts(
    predecessors: Sequence[Sequence[int]], kinds: Sequence[Hashable], first: Hashable | None = None
) -> list[list[int]]:
    """Parts in the order in which they run; each holds positions of nodes of one kind, in ascending order.

    `predecessors[i]`: positions below i whose results node i reads. `kinds`: at most two. Of two orders with equally
    many parts the one that begins with the kind `first` is taken. Raises ValueError for more kinds than two, or nodes
    out of order.
    """
    found = sorted(set(kinds), key=lambda kind: (kind != first, str(kind)))
    if len(found) > 2:
        raise ValueError(f"nodes of {len(found)} kinds: {found}")
    orders = [_parts(predecessors, kinds, begin) for begin in found]
    return min(orders, key=len, default=[])


def _parts(predecessors: Sequence[Sequence[int]], kinds: Sequence[Hashable], begin: Hashable) -> list[list[int]]:
    """Earliest parts when the first one is of the kind `begin`."""
    part: list[int] = []
    for node, kind in enumerate(kinds):
        earliest = 0
        for other in predecessors[node]:
            if other >= node:
                raise ValueError(f"node {node} reads node {other}, which does not come before it")
            earliest = max(earliest, part[other])
        parity = 0 if kind == begin else 1
        part.append(earliest + (earliest % 2 != parity))
    parts: list[list[int]] = [[] for _ in range(max(part, default=-1) + 1)]
    for node, number in enumerate(part):
        parts[number].append(node)
    return [nodes for nodes in parts if nodes]
