"""`simplify` beyond its numbered cases: what must not break, determinism, the guard around onnxsim, real models."""

from __future__ import annotations

import sys

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from graphopt import graph as g
from graphopt import model as models
from graphopt.errors import SpecError
from graphopt.passes.base import Context
from graphopt.passes.cleanup import guarded_onnxsim
from graphopt.passes.simplify import Simplify
from graphopt.spec import bind, parse
from tests.passes.oracle import SHAPES, random_feeds, run
from tests.rewrites.pairs import parse as model_of

OWN = Simplify(use_onnxsim=False)


def simplify(model: ir.Model, rewrite: Simplify = OWN) -> ir.Model:
    result = rewrite.run(model.clone(), Context())
    models.check(result.model, "the simplified model")
    assert models.signature(result.model) == models.signature(model)
    assert len(result.model.graph) <= len(model.graph)
    return result.model


def same_numbers(model: ir.Model, simplified: ir.Model, shapes=None) -> None:
    feeds = random_feeds(model, shapes or {})
    for a, b in zip(run(model, feeds), run(simplified, feeds), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(b, a)


@pytest.mark.parametrize(
    "body",
    [
        # An output that is an input, by way of nodes that change nothing.
        "g (float[2] x) => (float[2] y) { a = Identity(x) y = Identity(a) }",
        # Two outputs of one value.
        "g (float[2] x) => (float[2] y, float[2] z) { r = Relu(x) y = Identity(r) z = Identity(r) }",
        "g (float[2] x) => (float[2] y, float[2] z) { y = Relu(x) z = Relu(y) }",
        "g (float[2] x) => (float[2] y, float[2] z) { y = Neg(x) z = Neg(x) }",
        # An output that is constant.
        "g (float[2] x) => (float[2] y, float[2] z) <float[2] c = {1, 2}> { y = Neg(x) z = Sqrt(c) }",
        "g (float[2] x) => (float[2] y, float[2] c) <float[2] c = {1, 2}> { y = Add(x, c) }",
        "g (float[2] x) => (float[2] y, float[2] c) { c = Constant <value = float[2] {1, 2}> () y = Add(x, c) }",
        "g (float[N, 2] x) => (float[N, 2] y, int64[2] s) { y = Neg(x) s = Shape(x) }",
        "g (float[3, 2] x) => (float[3, 2] y, int64[2] s) { y = Neg(x) s = Shape(x) }",
        # Optional inputs in the middle, optional outputs.
        """g (float[2, 2] x) => (float[2, 2] y) <float six = {6}> { r = Identity(x) y = Clip(r, , six) }""",
        """g (float[1, 1, 4, 4] x) => (float[1, 1, 2, 2] y) {
            y, i = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (x) }""",
        # Sequences.
        """g (float[2] x) => (float[4] y) { a = Identity(x) s = SequenceConstruct(a, a)
            y = ConcatFromSequence <axis = 0> (s) }""",
        # A subgraph that reads values of the outer graph, which are folded, merged and renamed.
        """g (float[2] x, bool c) => (float[2] y) <float[2] k = {1, 2}> {
            a = Neg(x) b = Neg(x) s = Sqrt(k) i = Identity(b) y = If (c) <
                then_branch = t () => (float[2] p) { p = Add(a, s) },
                else_branch = e () => (float[2] q) { q = Mul(i, s) }> }""",
        """g (float[2] x) => (float[2] y) <int64 n = {3}, bool t = {1}, float[2] k = {1, 2}> {
            a = Identity(x) s = Exp(k) y = Loop (n, t, a) <
                body = b (int64 i, bool ci, float[2] v) => (bool co, float[2] w) {
                    co = Identity(ci) w = Mul(v, s) }> }""",
        # Quantized weights must not go back to float.
        """g (float[2, 2] x) => (float[2, 2] y) <int8[2, 2] q = {1, 2, 3, 4}, float s = {0.5}, int8 z = {0}> {
            w = DequantizeLinear(q, s, z) y = MatMul(x, w) }""",
        # Strings and booleans.
        "g (bool[2] x) => (bool[2] y) <bool[2] a = {1, 0}> { n = Not(a) y = And(x, n) }",
        # Zero-sized tensors.
        "g (float[0, 2] x) => (float[0, 2] y) <int64[2] t = {0, 2}> { r = Reshape(x, t) y = Neg(r) }",
        # Shape slices, negative indices, division, product.
        """g (float[2, N, 6] x) => (float[A, 2] y) <int64 last = {-1}, int64 two = {2}, int64[1] ax = {0},
            int64[1] mone = {-1}> { s = Shape(x) n = Gather(s, last) h = Div(n, two) m = Mul(h, two) d = Div(m, h)
            u = Unsqueeze(d, ax) t = Concat <axis = 0> (mone, u) y = Reshape(x, t) }""",
    ],
)  # fmt: skip
def test_nothing_breaks(body):
    model = model_of(body)
    shapes = {"x": (2, 3, 6)} if "N, 6" in body else {"x": (3, 2)} if "N, 2" in body else {}
    same_numbers(model, simplify(model), shapes)


@pytest.mark.long
def test_nothing_breaks_with_onnxsim():
    (bodies,) = (mark.args[1] for mark in test_nothing_breaks.pytestmark)  # type: ignore[attr-defined]
    for body in bodies:
        model = model_of(body)
        shapes = {"x": (2, 3, 6)} if "N, 6" in body else {"x": (3, 2)} if "N, 2" in body else {}
        same_numbers(model, simplify(model, Simplify(use_onnxsim=True)), shapes)


def test_quantized_weights_stay_quantized():
    model = model_of("""g (float[2, 2] x) => (float[2, 2] y) <int8[2, 2] q = {1, 2, 3, 4}, float s = {0.5}> {
        w = DequantizeLinear(q, s) v = Identity(w) y = MatMul(x, v) }""")
    result = Simplify(use_onnxsim=True).run(model, Context())
    assert [n.op_type for n in result.model.graph] == ["DequantizeLinear", "MatMul"]
    assert any("quantized weights" in note for note in result.notes)


def test_local_functions_stay():
    proto = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 17, "own" : 1]>
        g (float[2] x) => (float[2] y) { a = Identity(x) b = own.twice(a) y = Neg(b) }
        <opset_import: ["" : 17], domain: "own"> twice (p) => (q) { q = Add(p, p) }""")
    model = ir.from_proto(proto)
    result = OWN.run(model.clone(), Context()).model
    assert [n.op_type for n in result.graph] == ["twice", "Neg"]
    assert len(result.functions) == 1
    same_numbers(model, result)


def test_nodes_with_subgraphs_are_reported():
    model = model_of("""g (float[2] x, bool c) => (float[2] y) { y = If (c) <
        then_branch = t () => (float[2] p) { p = Neg(x) }, else_branch = e () => (float[2] q) { q = Abs(x) }> }""")
    (skip,) = OWN.run(model, Context()).skipped
    assert skip.node == "y" and "subgraphs" in skip.reason


def test_tied_weights_are_not_copied():
    """A large weight used as it is and transposed: folding the Transpose would store it twice."""
    rng = np.random.default_rng(0)
    weight = numpy_helper.from_array(rng.standard_normal((300, 300)).astype(np.float32), "w")
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("Transpose", ["w"], ["t"], perm=[1, 0]),
        helper.make_node("MatMul", ["a", "t"], ["y"]),
    ]
    model = _model(nodes, {"x": (1, 300)}, {"y": (1, 300)}, [weight])
    assert [n.op_type for n in simplify(model).graph] == ["MatMul", "Transpose", "MatMul"]
    alone = _model(nodes[1:], {"a": (1, 300)}, {"y": (1, 300)}, [weight])
    simplified = simplify(alone)
    assert [n.op_type for n in simplified.graph] == ["MatMul"]
    assert models.parameter_bytes(simplified) == models.parameter_bytes(alone)


def test_equal_tables_of_indices_are_kept_once():
    """Large ones too: folding leaves one for every node that reads it."""
    table = np.arange(600, dtype=np.int64) % 4
    nodes = [
        helper.make_node("Gather", ["x", "a"], ["p"], axis=0),
        helper.make_node("Gather", ["y", "b"], ["q"], axis=0),
        helper.make_node("Add", ["p", "q"], ["z"]),
    ]
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "g",
        [info("x", onnx.TensorProto.FLOAT, [4]), info("y", onnx.TensorProto.FLOAT, [4])],
        [info("z", onnx.TensorProto.FLOAT, [600])],
        [numpy_helper.from_array(table, name) for name in "ab"],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    found = Simplify().run(models.from_proto(proto), Context()).model
    assert len(found.graph.initializers) == 1


def test_dropout_in_training_stays():
    model = model_of("""g (float[2] x) => (float[2] y) <float r = {0.5}, bool t = {1}> {
        a = Dropout <seed = 1> (x, r, t) b = Dropout <seed = 1> (x, r, t) y = Add(a, b) }""")
    assert [n.op_type for n in OWN.run(model, Context()).model.graph] == ["Dropout", "Dropout", "Add"]


def test_names_of_what_stays_stay():
    model = model_of("""g (float[2] x) => (float[2] y) <float[2] a = {1, 2}, float[2] b = {3, 4}> {
        [first] r = Relu(x) [dead] i = Identity(r) [sum] s = Add(a, b) [last] y = Mul(i, s) }""")
    simplified = simplify(model)
    assert [n.name for n in simplified.graph] == ["first", "last"]
    assert list(simplified.graph.initializers) == ["s"]


def test_options():
    assert str(Simplify()) == "simplify"
    assert bind(parse("simplify{use_onnxsim=true,max_folded_bytes=10}"), Simplify, "pass") == Simplify(True, 10)
    with pytest.raises(SpecError, match="must not be negative"):
        bind(parse("simplify{max_folded_bytes=-1}"), Simplify, "pass")


# -- the guard around onnxsim ---------------------------------------------------------------------------------------

FOLDABLE_IF = """g (float[2] x) => (float[2] y) <bool c = {1}> {
    y = If (c) <then_branch = t () => (float[2] a) { a = Mul(x, x) },
                else_branch = e () => (float[2] b) { b = Neg(x) }> }"""


def _with_script(monkeypatch, script: str):
    monkeypatch.setattr(guarded_onnxsim, "_SCRIPT", script)
    model = model_of(FOLDABLE_IF)
    result = Simplify(use_onnxsim=True).run(model.clone(), Context())
    assert [n.op_type for n in result.model.graph] == ["If"]
    same_numbers(model, result.model)
    return " ".join(result.notes)


def test_a_crash_of_onnxsim_is_survived(monkeypatch):
    assert "signal 11" in _with_script(monkeypatch, "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")


def test_an_exception_of_onnxsim_is_survived(monkeypatch):
    assert "exit code 1: ValueError: odd model" in _with_script(monkeypatch, "raise ValueError('odd model')")


def test_a_hang_of_onnxsim_is_survived(monkeypatch):
    monkeypatch.setattr(guarded_onnxsim, "_TIMEOUT_S", 0.5)
    assert "took over" in _with_script(monkeypatch, "import time; time.sleep(60)")


def test_garbage_from_onnxsim_is_refused(monkeypatch):
    assert "cannot be read" in _with_script(monkeypatch, "import sys; open(sys.argv[2], 'wb').write(b'garbage')")


_ANSWER = """\
import sys, onnx
model = onnx.parser.parse_model('''<ir_version: 8, opset_import: ["" : 17]> %s''')
onnx.save(model, sys.argv[2])
"""


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("g (float[3] x) => (float[3] y) { y = Mul(x, x) }", "signature"),
        ("g (float[2] x) => (float[2] y) { a = Mul(x, x) b = Neg(a) y = Neg(b) }", "removes no node"),
        ("g (float[2] x) => (float[2] y) { a = Mul(x, x) b = Neg(a) d = Neg(b) y = Identity(d) }", "3 nodes become 4"),
        ("g (float[2] x) => (float[2] y) { a = Add(x, x) y = Mul(a, x) }", "does not compute the same bits"),
        ("g (float[2] x) => (float[2] y) { y = Mul(x, nothing) }", "not a valid ONNX model"),
    ],
)
def test_a_wrong_answer_of_onnxsim_is_refused(monkeypatch, answer, reason):
    assert reason in _with_script(monkeypatch, _ANSWER % answer)


def test_growth_in_bytes_is_refused(monkeypatch):
    constant = ", ".join(["0.0"] * 4000)
    body = f"g (float[2] x) => (float[2] y) <float[4000] c = {{{constant}}}> {{ s = ReduceMax(c) y = Mul(x, s) }}"
    assert "parameter bytes become" in _with_script(monkeypatch, _ANSWER % body)


def test_overridable_initializers_survive_onnxsim():
    keep = Simplify(use_onnxsim=True, keep_overridable=True)
    body = FOLDABLE_IF.replace("(float[2] x)", "(float[2] x, float[2] w)").replace(
        "<bool c", "<float[2] w = {3, 4}, bool c"
    )
    model = model_of(body.replace("Mul(x, x)", "Mul(x, w)"))
    result = keep.run(model.clone(), Context())
    assert [n.op_type for n in result.model.graph] == ["Mul"]
    assert [v.name for v in result.model.graph.inputs] == ["x", "w"]
    x = np.array([1, 2], np.float32)
    np.testing.assert_array_equal(run(result.model, {"x": x})[0], [3, 8])
    np.testing.assert_array_equal(run(result.model, {"x": x, "w": x})[0], [1, 4])


# -- random graphs --------------------------------------------------------------------------------------------------


def _model(nodes, inputs, outputs, initializers, opset=17) -> ir.Model:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in inputs.items()],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in outputs.items()],
        initializers,
    )
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8))


@st.composite
def random_models(draw) -> tuple[ir.Model, tuple[int, int, int]]:
    """A few dozen nodes that mostly do nothing, repeat each other, or compute shapes, over a value of rank 3."""
    shape = (draw(st.integers(1, 3)), draw(st.sampled_from([1, 4])), draw(st.integers(1, 4)))
    declared = tuple(d if draw(st.booleans()) else f"d{axis}" for axis, d in enumerate(shape))
    values: list[tuple[str, tuple[int, ...]]] = [("x", shape)]
    nodes, initializers, integers = [], [], {}

    def constant(array: np.ndarray) -> str:
        name = f"c{len(initializers)}"
        initializers.append(numpy_helper.from_array(array, name))
        return name

    def vector(*elements: int) -> str:
        return integers.setdefault(elements, constant(np.array(elements, np.int64)))

    for step in range(draw(st.integers(3, 14))):
        source, at = draw(st.sampled_from(values))
        out = f"v{step}"
        kind = draw(st.sampled_from(["unary", "same", "binary", "transpose", "reshape", "by_shape", "slice", "concat"]))
        if kind == "unary":
            nodes.append(helper.make_node(draw(st.sampled_from(["Relu", "Neg", "Abs", "Floor"])), [source], [out]))
        elif kind == "same":
            kinds = {
                "Identity": [source],
                "Add": [source, constant(np.zeros(1, np.float32))],
                "Mul": [constant(np.ones((), np.float32)), source],
                "Tile": [source, vector(*(1 for _ in at))],
                "Pad": [source, vector(*(0 for _ in range(2 * len(at))))],
                "Expand": [source, vector(1)],
            }
            op = draw(st.sampled_from(sorted(kinds)))
            nodes.append(helper.make_node(op, kinds[op], [out]))
        elif kind == "binary":
            other = draw(st.sampled_from([n for n, s in values if s == at]))
            nodes.append(helper.make_node(draw(st.sampled_from(["Add", "Sub", "Max"])), [source, other], [out]))
        elif kind == "transpose":
            perm = draw(st.permutations(range(len(at))))
            nodes.append(helper.make_node("Transpose", [source], [out], perm=perm))
            at = tuple(at[p] for p in perm)
        elif kind == "reshape":
            total = int(np.prod(at))
            at = draw(st.sampled_from([at, (total,), (1, total), (total, 1, 1), (*at, 1)]))
            target = list(at)
            if draw(st.booleans()):
                target[draw(st.integers(0, len(at) - 1))] = -1
            nodes.append(helper.make_node("Reshape", [source, vector(*target)], [out]))
        elif kind == "by_shape":
            nodes.append(helper.make_node("Shape", [source], [f"{out}s"]))
            nodes.append(helper.make_node("Gather", [f"{out}s", constant(np.array(0, np.int64))], [f"{out}g"]))
            nodes.append(helper.make_node("Unsqueeze", [f"{out}g", vector(0)], [f"{out}u"]))
            nodes.append(helper.make_node("Concat", [f"{out}u", vector(-1)], [f"{out}t"], axis=0))
            nodes.append(helper.make_node("Reshape", [source, f"{out}t"], [out]))
            at = (at[0], int(np.prod(at[1:])))
        elif kind == "slice":
            axis = draw(st.integers(0, len(at) - 1))
            start = draw(st.integers(0, at[axis] - 1))
            end = draw(st.sampled_from([2**31 - 1, at[axis], start + 1]))
            nodes.append(helper.make_node("Slice", [source, vector(start), vector(end), vector(axis)], [out]))
            at = tuple(min(end, d) - start if a == axis else d for a, d in enumerate(at))
        else:
            axis = draw(st.integers(0, len(at) - 1))
            nodes.append(helper.make_node("Concat", [source, source], [out], axis=axis))
            at = tuple(2 * d if a == axis else d for a, d in enumerate(at))
        values.append((out, at))
    outputs = draw(st.lists(st.sampled_from(values[1:]), min_size=1, max_size=3, unique=True))
    model = _model(nodes, {"x": declared}, {n: [None] * len(s) for n, s in outputs}, initializers)
    return model, shape


@settings(max_examples=150, deadline=None)
@given(random_models())
def test_random_graphs_compute_the_same(drawn):
    model, shape = drawn
    models.check(model, "the random model")
    simplified = simplify(model)
    same_numbers(model, simplified, {"x": shape})
    again = OWN.run(simplified.clone(), Context())
    assert len(again.model.graph) == len(simplified.graph), "a second run finds nothing more"


# -- real models ----------------------------------------------------------------------------------------------------

MOST_NODES = {
    "squeezenet1_1": 65, "mobilenetv2": 100, "mobilenetv1_075": 85, "tiny_darknet": 53, "facenet": 313,
    "deeplabv3_mnv2": 106, "resnet20_cifar10": 73, "resnet56_cifar10": 199, "mnist_cnn": 11, "ultraface_rfb320": 158,
    "yolox_nano": 365, "nanodet_m": 243, "super_resolution": 10, "style_transfer": 192, "nsnet2": 18, "gtcrn": 372,
    "stories260k": 354, "magika": 76,
}  # fmt: skip
"""Before BatchNormalization is folded; dynamic dimensions kept."""
LARGE = {"facenet", "deeplabv3_mnv2"}
REPACKED = {"mnist_cnn"}
"""Its MatMul reads a reshaped weight; as a constant, ONNX Runtime packs it and sums in another order."""


@pytest.mark.shared
@pytest.mark.parametrize("name", sorted(MOST_NODES))
def test_shared_models(shared_model, name):
    original = models.load(shared_model(name))
    simplified = simplify(original)
    assert g.count_nodes(simplified.graph) <= MOST_NODES[name]
    feeds = random_feeds(original, SHAPES[name])
    for a, b in zip(run(original, feeds), run(simplified, feeds), strict=True):
        if name in REPACKED:  # sums of 256 products of about 1: 256 * eps
            np.testing.assert_allclose(b, a, rtol=0, atol=256 * 2.0**-23 * max(1.0, float(np.abs(a).max())))
        else:
            np.testing.assert_array_equal(b, a)


@pytest.mark.shared
@pytest.mark.parametrize("name", ["resnet20_cifar10", "nanodet_m", "gtcrn", "stories260k"])
def test_two_runs_give_the_same_bytes(shared_model, name):
    first, second = (simplify(models.load(shared_model(name))) for _ in range(2))
    assert models.to_bytes(first) == models.to_bytes(second)


@pytest.mark.shared
def test_onnxsim_is_held_to_the_bits(shared_model):
    """It turns (x * 0.1) * prior into x * (0.1 * prior) in this model: one node less, other bits."""
    result = Simplify(use_onnxsim=True).run(models.load(shared_model("ultraface_rfb320")), Context())
    assert any("does not compute the same bits" in note for note in result.notes)
    assert g.count_nodes(result.model.graph) <= MOST_NODES["ultraface_rfb320"]


def test_work_grows_with_the_nodes_and_not_faster():
    """Calls of functions, not seconds: four times the nodes, four times the work."""
    few, many = (_calls_to_simplify(_blocks(size)) for size in (60, 240))
    assert 3 < many / few < 5


def _calls_to_simplify(model: ir.Model) -> int:
    count = 0

    def watch(frame, event, argument):
        nonlocal count
        count += 1

    sys.setprofile(watch)
    try:
        OWN.run(model, Context())
    finally:
        sys.setprofile(None)
    return count


def _blocks(size: int) -> ir.Model:
    """Each: a Reshape by Shape, Gather and Concat, twice the same Neg, a Dropout, constants that fold."""
    nodes, constants, value = [], [], "x"
    for k in range(size):
        constants += [numpy_helper.from_array(np.array([8 * (k % 3 + 1) // (k % 3 + 1)]), f"c{k}"),
                      numpy_helper.from_array(np.array(k, np.float32), f"f{k}")]  # fmt: skip
        made = [
            ("Shape", [value], {}), ("Gather", ["0", "zero"], {}), ("Unsqueeze", ["1", "axes"], {}),
            ("Concat", ["2", f"c{k}"], {"axis": 0}), ("Reshape", [value, "3"], {}), ("Neg", ["4"], {}),
            ("Neg", ["4"], {}), ("Add", ["5", "6"], {}), ("Sqrt", [f"f{k}"], {}), ("Mul", ["7", "8"], {}),
            ("Dropout", ["9"], {}),
        ]  # fmt: skip
        for number, (op, inputs, attributes) in enumerate(made):
            names = [f"v{k}_{name}" if name.isdigit() else name for name in inputs]
            nodes.append(helper.make_node(op, names, [f"v{k}_{number}"], **attributes))
        value = f"v{k}_10"
    constants += [numpy_helper.from_array(np.array(0), "zero"), numpy_helper.from_array(np.array([0]), "axes")]
    shape = ["N", 8]
    graph = helper.make_graph(
        nodes, "blocks", [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(value, TensorProto.FLOAT, shape)], constants,
    )  # fmt: skip
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))
