"""Walking and rewiring a graph."""

from __future__ import annotations

import numpy as np
import pytest

from graphopt import graph as g
from tests.rewrites.pairs import parse


def model():
    return parse("""g (float[N, 2] x, float[2] d) => (float[N, 2] y, float[N, 2] z)
    <float[2] d = {1, 2}, float[2] w = {3, 4}, int64[2] i = {5, 6}, int64 s = {7}> {
    [first] a = Add(x, w) c = Constant <value = float[2] {8, 9}> () b = Mul(a, c) y = Mul(b, b)
    s2 = Constant <value = float {1}> () z = Clip(a, , s2) r = ConstantOfShape(i) e = Add(x, d) }""")


def values(found):
    return {v.name: v for n in found.graph for v in (*n.inputs, *n.outputs) if v is not None}


def test_constants():
    by_name = values(model())
    np.testing.assert_array_equal(g.constant_of(by_name["w"]), [3, 4])
    np.testing.assert_array_equal(g.constant_of(by_name["c"]), [8, 9])
    assert g.constant_of(by_name["d"]) is None, "a caller may override it"
    assert g.constant_of(by_name["a"]) is None
    assert g.constant_of(None) is None
    assert g.integers_of(by_name["i"]) == [5, 6]
    assert g.integers_of(by_name["w"]) is None


def test_consumers_and_shapes():
    found = model()
    by_name = values(found)
    assert g.sole_consumer(by_name["b"]) is by_name["y"].producer(), "one node that reads it twice"
    assert g.sole_consumer(by_name["a"]) is None
    assert g.sole_consumer(by_name["y"]) is None, "an output of the model"
    assert g.dims_of(by_name["x"]) == (None, 2)
    assert g.static_shape(by_name["x"]) is None
    assert g.static_shape(by_name["w"]) == (2,)
    clip = by_name["z"].producer()
    assert clip is not None and g.input_of(clip, 1) is None and g.input_of(clip, 7) is None
    assert g.label(found.graph[0]) == "first" and g.opset_of(found) == 17
    assert g.is_onnx(clip) and g.is_onnx(clip, "Clip", "Relu") and not g.is_onnx(clip, "Relu")
    assert g.count_nodes(found.graph) == len(found.graph) - 2


def test_names_and_initializers():
    found = model()
    assert g.fresh_name(found.graph, "new") == "new"
    assert g.fresh_name(found.graph, "first") == "first_2"
    assert g.fresh_name(found.graph, "x") == "x_2"
    scalar = g.add_initializer(found.graph, "w", np.array(1.5, np.float32))
    assert scalar.name == "w_2" and scalar.shape is not None and len(scalar.shape) == 0
    assert g.remove_unused_initializers(found.graph) == 2, "s and the new one; d is an input"
    assert sorted(found.graph.initializers) == ["d", "i", "w"]


def test_a_name_inside_a_subgraph_is_taken_too():
    found = parse("""g (float[2] x, bool c) => (float[2] y) { y = If (c) <
        then_branch = t () => (float[2] p) { inner = Neg(x) p = Neg(inner) },
        else_branch = e () => (float[2] q) { q = Abs(x) }> }""")
    assert g.fresh_name(found.graph, "inner") == "inner_2"
    assert g.holds_subgraphs(found.graph[0])
    assert g.count_nodes(found.graph) == 4


def test_replacing():
    found = model()
    by_name = values(found)
    assert g.replace_value(by_name["b"], by_name["a"])
    assert [v.name for v in found.graph[3].inputs if v] == ["a", "a"]
    assert not g.replace_value(by_name["y"], by_name["x"]), "an output cannot become an input"
    assert not g.replace_value(by_name["y"], by_name["w"]), "nor an initializer"
    assert not g.replace_value(by_name["y"], by_name["z"]), "nor another output"
    assert not g.replace_value(by_name["a"], by_name["a"])
    shape = by_name["y"].shape
    assert g.replace_value(by_name["y"], by_name["a"])
    assert [v.name for v in found.graph.outputs] == ["y", "z"]
    assert found.graph.outputs[0] is by_name["a"] and by_name["a"].shape == shape


@pytest.mark.parametrize("array", [np.zeros(()), np.zeros((2, 0)), np.arange(6.0).reshape(2, 3).T])
def test_initializers_keep_shape_and_order(array):
    found = model()
    value = g.add_initializer(found.graph, "n", array)
    np.testing.assert_array_equal(g.constant_of(value), array)


def test_names_are_remembered_and_stay_fresh():
    model = parse("g (float[2] x) => (float[2] y) { r = Relu(x) y = Neg(r) }")
    with g.remembering_names(model.graph):
        names = [g.fresh_name(model.graph, "r") for _ in range(3)]
        g.add_initializer(model.graph, "r", np.zeros(1, np.float32))
    assert names == ["r_2", "r_3", "r_4"] and "r_5" in model.graph.initializers
    assert g.fresh_name(model.graph, "r_5") == "r_5_2", "collected anew"
