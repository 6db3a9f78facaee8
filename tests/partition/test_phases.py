"""The fewest parts of random graphs: convex, in order, of one kind each, and no fewer are possible."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphopt.partition import fewest_parts


@st.composite
def graphs(draw, most: int):
    """Predecessors and kinds of the nodes of a random acyclic graph."""
    count = draw(st.integers(1, most))
    predecessors = [draw(st.lists(st.integers(0, i - 1), max_size=3, unique=True)) if i else [] for i in range(count)]
    return predecessors, draw(st.lists(st.sampled_from(["a", "b"]), min_size=count, max_size=count))


@given(graphs(40))
def test_parts_cover_all_nodes_once_in_order_and_are_convex(graph):
    predecessors, kinds = graph
    parts = fewest_parts(predecessors, kinds)
    assert sorted(node for part in parts for node in part) == list(range(len(kinds)))
    home = {node: number for number, part in enumerate(parts) for node in part}
    assert all(len({kinds[node] for node in part}) == 1 and part == sorted(part) for part in parts)
    # An edge never leads back to an earlier part. So no two parts wait for each other, and a path from a part into
    # another one cannot come back: each is convex.
    assert all(home[other] <= home[node] for node, others in enumerate(predecessors) for other in others)


@given(graphs(6))
def test_no_order_of_parts_has_fewer(graph):
    predecessors, kinds = graph
    parts = fewest_parts(predecessors, kinds)

    def possible(count: int) -> bool:
        for home in itertools.product(range(count), repeat=len(kinds)):
            alike = all(len({kinds[n] for n in range(len(kinds)) if home[n] == part}) <= 1 for part in range(count))
            if alike and all(home[o] <= home[n] for n, others in enumerate(predecessors) for o in others):
                return True
        return False

    assert not possible(len(parts) - 1)


def test_the_kind_asked_for_goes_first_where_it_costs_nothing():
    assert fewest_parts([[], []], ["a", "b"], "b") == [[1], [0]]
    assert fewest_parts([[], [0]], ["a", "b"], "b") == [[0], [1]]


def test_what_is_no_such_graph_is_refused():
    with pytest.raises(ValueError, match="3 kinds"):
        fewest_parts([[], [], []], ["a", "b", "c"])
    with pytest.raises(ValueError, match="does not come before"):
        fewest_parts([[1], []], ["a", "a"])
    assert fewest_parts([], []) == []
