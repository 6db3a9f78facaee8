"""Shapes and shape vectors with dynamic dimensions, against what ONNX Runtime computes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from graphopt.shapes.dimensions import Dim
from graphopt.shapes.facts import ShapeFacts
from graphopt.shapes.inferred import inferred_shapes
from graphopt.shapes.onnx_inference import infer_shapes
from tests.passes.oracle import run
from tests.rewrites.pairs import parse

NODES = [
    "Conv <pads = [1, 1]> (x, w)",
    "Conv <strides = [2]> (x, w)",
    "Conv <dilations = [2], pads = [2, 2]> (x, w)",
    "MaxPool <kernel_shape = [3], strides = [2], pads = [1, 1]> (x)",
    "AveragePool <kernel_shape = [2]> (x)",
    "Relu (x)",
    "Add (x, x)",
    "Concat <axis = 1> (x, x)",
    "Concat <axis = 0> (x, x)",
    "Transpose <perm = [2, 0, 1]> (x)",
    "Reshape (x, zero_one)",
    "Reshape (x, flat)",
    "ConvTranspose (x, w)",
    "ConvTranspose <strides = [2], pads = [1, 0], output_padding = [1], dilations = [2]> (x, w)",
    "Unsqueeze (x, axis)",
    "ReduceMean <axes = [1], keepdims = 0> (x)",
    "ReduceMax <axes = [-1]> (x)",
    "ReduceSum (x, axis)",
    "Tile (x, thrice)",
    "Expand (x, thrice)",
    "Pad (x, pads)",
    "Gather <axis = 1> (x, indices)",
    "GatherND (x, place)",
    "MatMul (square, x)",
    "Slice (x, axis, two, axis)",
    "IsNaN (x)",
    "Flatten (x)",
    "Flatten <axis = 0> (x)",
    "Flatten <axis = 2> (x)",
    "Flatten <axis = -1> (x)",
    "Flatten <axis = 3> (x)",
    "GatherElements <axis = 1> (x, only)",
]


def unknown_sizes(shape, n, h):
    """Evaluate a symbolic shape for N = n and H = h."""
    sizes = []
    for size in shape:
        if not isinstance(size, Dim):
            sizes.append(size)
            continue
        text = repr(size)
        for floor in ("floor", "trunc"):
            text = text.replace(floor, "int")
        sizes.append(int(eval(text, {"__builtins__": {"int": lambda v: np.floor(v), "min": min}}, {"N": n, "H": h})))
    return tuple(sizes)


@pytest.mark.parametrize("node", NODES)
def test_shapes_are_what_the_runtime_makes(node):
    model = parse(f"""g (float[N, 2, H] x) => (int64[R] s)
    <float[2, 2, 3] w = {{1,2,3,4,5,6,7,8,9,10,11,12}}, int64[3] zero_one = {{0, 1, -1}}, int64[1] flat = {{-1}},
     int64[1] axis = {{1}}, int64[1] two = {{2}}, int64[3] thrice = {{1, 2, 1}}, int64[6] pads = {{0, 1, 2, 0, 0, 3}},
     int64[2, 2] indices = {{0, 1, 1, 0}}, int64[1, 2] place = {{0, 1}},
     int64[1, 4, 2] only = {{0, 1, 0, 1, 1, 1, 1, 0}}, float[3, 2] square = {{1, 2, 3, 4, 5, 6}}> {{
        y = {node} s = Shape(y) }}""")
    infer_shapes(model)
    shape = ShapeFacts(model).shape(model.graph[0].outputs[0])
    assert shape is not None
    for n, h in ((3, 10), (1, 7), (2, 12)):
        (found,) = run(model, {"x": np.zeros((n, 2, h), np.float32)})
        assert unknown_sizes(shape, n, h) == tuple(found)


@pytest.mark.parametrize(
    ("node", "sizes"),
    [
        ("Slice (table, zero, h, one)", "[1, 'min(8,H)']"),
        ("Slice (x, zero, h, two)", "['N', 2, 'H']"),
        ("Slice (x, zero, twice, one)", "['N', 'min(2,2*N)', 'H']"),
        ("Slice (table, one, h, one)", None),
        ("Slice (table, zero, less, one)", None),
    ],
)
def test_the_first_elements_as_many_as_a_dimension(node, sizes):
    """As positions are cut off a table; `less` may be negative, which counts from the end."""
    model = parse(f"""g (float[N, 2, H] x, float[1, 8] table) => (int64[R] s)
    <int64[1] zero = {{0}}, int64[1] one = {{1}}, int64[1] two = {{2}}, int64 first = {{0}}, int64[1] three = {{3}}> {{
        whole = Shape(x) n = Gather(whole, zero) h = Gather(whole, two) twice = Add(n, n) less = Sub(h, three)
        y = {node} s = Shape(y) }}""")
    infer_shapes(model)
    shape = ShapeFacts(model).shape(model.graph[-2].outputs[0])
    assert shape is not None
    known = [repr(size) if isinstance(size, Dim) else size for size in shape]
    assert (str(known) == sizes) if sizes else not any("min" in str(size) for size in known)
    for n, h in ((3, 10), (1, 7), (2, 12)):
        (found,) = run(model, {"x": np.zeros((n, 2, h), np.float32), "table": np.zeros((1, 8), np.float32)})
        assert not sizes or unknown_sizes(shape, n, h) == tuple(found)


def test_what_was_cut_and_added_to_all_is_as_long_as_all():
    """Embeddings of positions, the first S of a table, and of words: (1, min(8, S), 4) + (N, S, 4)."""
    model = parse("""g (float[N, S, 4] x, float[1, 8, 4] table) => (float[N, S, 4] y)
    <int64[1] zero = {0}, int64[1] one = {1}> {
        whole = Shape(x) s = Gather(whole, one) cut = Slice(table, zero, s, one) y = Add(x, cut) z = Add(cut, cut) }""")
    infer_shapes(model)
    facts = ShapeFacts(model)
    y, z = (facts.shape(node.outputs[0]) for node in list(model.graph)[-2:])
    assert y == (Dim.named("N"), Dim.named("S"), 4) and repr(z) == "(1, min(8,S), 4)"


@pytest.mark.parametrize(
    ("target", "content"),
    [("N, minus", "[N, 1]"), ("minus, H", "[1, H]"), ("less, H", None), ("one, minus", "[1, 1]")],
)
def test_a_target_for_expand(target, content):
    """Where(Equal(t, -1), 1, t); N - 1 may be -1."""
    model = parse(f"""g (float[N, H] x) => (int64[2] y)
    <int64[1] one = {{1}}, int64[1] minus = {{-1}}, int64[2] ones = {{1, 1}}, int64[2] all = {{-1, -1}},
     int64[1] zero = {{0}}> {{
        whole = Shape(x) N = Gather(whole, zero) H = Gather(whole, one) less = Sub(N, one)
        t = Concat <axis = 0> ({target}) e = Equal(t, all) y = Where(e, ones, t) }}""")
    infer_shapes(model)
    found = ShapeFacts(model).content(model.graph[-1].outputs[0])
    assert (None if found is None else str(list(found))) == content


def test_names_on_computed_values_are_not_believed():
    model = parse("""g (float[N, 2] x, float[M, 2] z) => (float[N, 2] y) {
        a = Relu(x) b = Relu(z) c = Shape(a) d = Shape(b) y = Neg(a) }""")
    by_name = {v.name: v for n in model.graph for v in n.outputs}
    for name in ("a", "b"):
        by_name[name].shape = ir.Shape(["same", 2])
    infer_shapes(model)
    facts = ShapeFacts(model)
    assert facts.shape(by_name["a"]) != facts.shape(by_name["b"])
    assert list(facts.content(by_name["c"])) == [Dim.named("N"), 2]  # type: ignore[arg-type]


def test_question_marks_are_not_names():
    model = parse("g (float[N, M] x) => (float[N, M] y) { y = Relu(x) }")
    model.graph.inputs[0].shape = ir.Shape(["?", "?"])
    first, second = ShapeFacts(model).shape(model.graph.inputs[0])  # type: ignore[misc]
    assert first != second


def test_shapes_that_depend_on_computed_contents():
    model = parse("""g (float[3, 4] x) => (float[A, B] y) <int64 one = {1}, int64 zero = {0}, int64[1] ax = {0}> {
        s = Shape(x) n = Gather(s, one) r = Range(zero, n, one) u = Unsqueeze(n, ax) c = ConstantOfShape(u)
        f = Cast <to = 1> (r) p = Add(f, c) y = Expand(p, s) }""")
    shapes = inferred_shapes(model)
    assert shapes["r"] == (4,) and shapes["c"] == (4,) and shapes["y"] == (3, 4) and shapes["n"] == ()
    assert len(model.graph) == 8, "the model itself is left alone"


def test_large_weights_do_not_travel_and_stay_in_order():
    weights = ", ".join(["1.0"] * 2048)
    model = parse(f"""g (float[N, 2048] x) => (float[N, 2048] y)
    <float[2048] a = {{{weights}}}, float[1] b = {{1}}, float[2048] c = {{{weights}}}> {{
        p = Mul(x, a) q = Add(p, b) y = Add(q, c) }}""")
    infer_shapes(model)
    assert list(model.graph.initializers) == ["a", "b", "c"]
    assert [v.name for v in model.graph.inputs] == ["x"]
    assert not any(v.is_graph_input() for v in model.graph.initializers.values())


def test_recurrent_layers_and_ranges():
    model = parse("""g (float[S, N, 3] x, float[2, 12, 3] w, float[2, 12, 4] v) =>
    (float[S, 2, N, 4] y, float[2, N, 4] h, int64[S] r)
    <int64 zero = {0}, int64 one = {1}> {
        y, h = GRU <hidden_size = 4, direction = "bidirectional"> (x, w, v)
        s = Shape(x) n = Gather(s, zero) r = Range(zero, n, one) }""")
    infer_shapes(model)
    facts = ShapeFacts(model)
    found = {v.name: facts.shape(v) for node in model.graph for v in node.outputs}
    s, n = Dim.named("S"), Dim.named("N")
    assert (found["y"], found["h"], found["r"]) == ((s, 2, n, 4), (2, n, 4), (s,))


@pytest.mark.parametrize(
    ("length", "starts", "ends"),
    [(-5, [0], [3]), (7, [0, 1], [3]), (7, [0], [3, 4])],
    ids=["negative", "longer", "shorter"],
)
def test_a_slice_that_makes_no_sense_decides_nothing(length, starts, ends):
    """Operands of different lengths, or of something of a negative size: files may say that."""
    x = ir.Value(name="x", shape=ir.Shape([length]), type=ir.TensorType(ir.DataType.FLOAT))
    operands = [
        ir.Value(name=n, const_value=ir.tensor(np.array(v, np.int64), name=n)) for n, v in (("s", starts), ("e", ends))
    ]
    y = ir.node("Slice", [x, *operands])
    graph = ir.Graph([x], y.outputs, nodes=[y], initializers=operands, opset_imports={"": 17})
    ShapeFacts(ir.Model(graph, ir_version=8))
