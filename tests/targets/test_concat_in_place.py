"""Concatenations whose parts are written in place: the same numbers, and no kernel that copies."""

from __future__ import annotations

import numpy as np
import pytest

from graphopt.targets.relax import concat_in_place
from tests.targets.oracle import TARGET, compiled, model, node, reference, sum_tolerance, uniform
from tests.targets.oracle import close as same

SQUARE = {"pads": [1, 1, 1, 1]}


@pytest.fixture
def dropped(monkeypatch):
    """How many concatenations were dropped, one number a compilation."""
    counts = []
    plan = concat_in_place._plan

    def counting(bindings, returned):
        made = plan(bindings, returned)
        counts.append(len(made.dropped))
        return made

    monkeypatch.setattr(concat_in_place, "_plan", counting)
    return counts


def _check(nodes, x, constants, outputs=("y",)):
    made, feeds = model(nodes, {"x": x}, list(outputs), constants), {"x": x}
    same(compiled(made, feeds), reference(made, feeds), sum_tolerance(64 * 9 * 3))


def _weights(*shapes):
    return {f"w{i}": uniform(i + 1, *shape) for i, shape in enumerate(shapes)}


def test_fire_module(dropped):
    """SqueezeNet: two convolutions of one tensor, side by side."""
    nodes = [
        node("Conv", ["x", "w0"], ["s"]),
        node("Conv", ["s", "w1"], ["a"]),
        node("Relu", ["a"], ["ra"]),
        node("Conv", ["s", "w2"], ["b"], **SQUARE),
        node("Relu", ["b"], ["rb"]),
        node("Concat", ["ra", "rb"], ["c"], axis=1),
        node("Conv", ["c", "w3"], ["y"]),
    ]
    _check(nodes, uniform(9, 1, 16, 7, 9), _weights((16, 16, 1, 1), (32, 16, 1, 1), (48, 16, 3, 3), (16, 80, 1, 1)))
    assert dropped == [1]


def test_a_concatenation_within_another(dropped):
    """The parts of the inner one, which somebody else reads too, find their place in the outer one."""
    nodes = [
        node("Conv", ["x", "w0"], ["a"]),
        node("Conv", ["x", "w1"], ["b"], **SQUARE),
        node("Conv", ["x", "w2"], ["c"], **SQUARE),
        node("Concat", ["b", "c"], ["inner"], axis=1),
        node("Concat", ["a", "inner"], ["outer"], axis=1),
        node("Conv", ["outer", "w3"], ["y"]),
        node("Conv", ["inner", "w4"], ["z"]),
    ]
    shapes = [(16, 16, 1, 1), (32, 16, 3, 3), (16, 16, 3, 3), (16, 64, 1, 1), (16, 48, 1, 1)]
    _check(nodes, uniform(9, 1, 16, 6, 6), _weights(*shapes), ["y", "z"])
    assert dropped == [2]


def test_growing_feature_map(dropped):
    """DenseNet: each concatenation is a prefix of the next, so one storage holds them all."""
    nodes, parts = [], ["x0"]
    constants = {"first": uniform(50, 16, 16, 1, 1)}
    nodes.append(node("Conv", ["x", "first"], ["x0"]))
    for layer in range(3):
        constants[f"w{layer}"] = uniform(layer, 16, 16 * len(parts), 3, 3)
        source = parts[0]
        if layer:
            source = f"c{layer}"
            nodes.append(node("Concat", list(parts), [source], axis=1))
        nodes.append(node("Conv", [source, f"w{layer}"], [f"x{layer + 1}"], **SQUARE))
        parts.append(f"x{layer + 1}")
    nodes += [node("Concat", list(parts), ["all"], axis=1), node("MaxPool", ["all"], ["y"], kernel_shape=[2, 2])]
    _check(nodes, uniform(9, 1, 16, 5, 5), constants)
    assert dropped == [3]


def test_a_part_in_two_orders_is_copied_once(dropped):
    nodes = [
        node("Conv", ["x", "w0"], ["a"]),
        node("Conv", ["x", "w1"], ["b"]),
        node("Concat", ["a", "b"], ["ab"], axis=1),
        node("Concat", ["b", "a"], ["ba"], axis=1),
        node("Conv", ["ab", "w2"], ["u"]),
        node("Conv", ["ba", "w3"], ["v"]),
        node("Add", ["u", "v"], ["y"]),
    ]
    _check(nodes, uniform(9, 1, 16, 4, 4), _weights((16, 16, 1, 1), (16, 16, 1, 1), (16, 32, 1, 1), (16, 32, 1, 1)))
    assert dropped == [1]


@pytest.mark.parametrize("case", ["batch", "twice", "input", "returned"])
def test_what_cannot_be_placed_is_copied(case, dropped):
    """A batch interleaves the parts; one part twice needs two places; inputs and results belong to the caller."""
    parts = {"batch": ["a", "b"], "twice": ["a", "a"], "input": ["a", "x"], "returned": ["a", "b"]}[case]
    nodes = [
        node("Conv", ["x", "w0"], ["a"]),
        node("Conv", ["x", "w1"], ["b"]),
        node("Concat", parts, ["c"], axis=1),
        node("Conv", ["c", "w2"], ["y"]),
    ]
    outputs = ["y", "a"] if case == "returned" else ["y", "b"] if case in ("twice", "input") else ["y"]
    x = uniform(9, 2 if case == "batch" else 1, 16, 4, 4)
    _check(nodes, x, _weights((16, 16, 1, 1), (16, 16, 1, 1), (16, 32, 1, 1)), outputs)
    assert sum(dropped) <= (1 if case in ("input", "returned") else 0)


def test_it_can_be_switched_off(dropped, tmp_path):
    from graphopt.targets.cpu import Cpu

    x = uniform(9, 1, 16, 4, 4)
    nodes = [
        node("Conv", ["x", "w0"], ["a"]),
        node("Conv", ["x", "w1"], ["b"]),
        node("Concat", ["a", "b"], ["c"], axis=1),
        node("Conv", ["c", "w2"], ["y"]),
    ]
    made = model(nodes, {"x": x}, ["y"], _weights((16, 16, 1, 1), (16, 16, 1, 1), (16, 32, 1, 1)))
    target = Cpu(threads=1, without="concat")
    target.build(target.lower(made), tmp_path)
    assert dropped == []
    TARGET.build(TARGET.lower(made), tmp_path)
    assert dropped == [1]


def test_offsets_are_those_of_aligned_pieces():
    whole = ((1, 4, 5, 16), "float32")
    assert concat_in_place._offsets([((1, 1, 5, 16), "float32"), ((1, 3, 5, 16), "float32")], whole) == [0, 320]
    assert concat_in_place._offsets([((1, 4, 2, 16), "float32"), ((1, 4, 3, 16), "float32")], whole) is None
    assert concat_in_place._offsets([((3, 5), "float32"), ((2, 5), "float32")], ((5, 5), "float32")) is None
    assert np.dtype("float32").itemsize * 5 * 16 == 320
