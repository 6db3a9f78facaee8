"""Raising the opset: what is rewritten computes the same; what means something else is refused by name."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from graphopt import model as models
from graphopt.passes.fuse_operators import FuseOperators
from graphopt.passes.fusion.opset import raise_opset, refusal
from graphopt.shapes.onnx_inference import infer_shapes
from tests.passes.fusing import Writing, fuse
from tests.passes.oracle import random_feeds, run
from tests.rewrites.pairs import parse


@pytest.mark.parametrize("version", [13, 17, 20, 23, 24])
def test_what_is_written_another_way_computes_the_same(version):
    model = parse(
        """g (float[2, 3, 1, 8] x) => (float[2, 24] y, float[2, 3, 4] z, float[2, 1] m, float[2, 3, 8] p) {
            s = Squeeze <axes = [2]> (x) a = Softmax <axis = 2> (s) f = Flatten(a) d = Dropout <ratio = 0.5> (f)
            u = Unsqueeze <axes = [0]> (d) y = Squeeze <axes = [0]> (u) z, rest = Split <axis = 2, split = [4, 4]> (s)
            b, c = Split <axis = 2> (s) t = Add(b, c) w = Concat <axis = 2> (t, rest) m2 = ReduceMean <axes = [1]> (f)
            m3 = ReduceSum <axes = [1]> (f) m4 = ReduceMax <axes = [1]> (f) mm = Add(m2, m3) m = Add(mm, m4)
            p = Relu(w) }""",
        opset=11,
    )
    feeds = random_feeds(model, {})
    expected = run(model, feeds)
    infer_shapes(model)
    assert refusal(model, version) is None
    raise_opset(model, version)
    models.check(model, "the raised model")
    assert model.opset_imports[""] == version
    for a, b in zip(expected, run(model, feeds), strict=True):
        np.testing.assert_array_equal(b, a)


@pytest.mark.parametrize(
    ("body", "opset", "version", "names"),
    [
        ("g (float[2, 3, 4] x) => (float[2, 3, 4] y) { y = Softmax <axis = 1> (x) }", 12, 13, "Softmax"),
        ("g (float[2, 3] x) => (float[2, 3] y) { y = Relu(x) }", 10, 13, "below 11"),
        ("""g (float[1, 1, 4, 4] x, float[1, 2, 2, 2] i) => (float[1, 1, 2, 2] y) {
            y = GridSample <mode = "bilinear"> (x, i) }""", 17, 20, "GridSample"),
        ("""g (float[1, 1, 5, 5] x) => (float[1, 1, 3, 3] y) {
            y = AveragePool <kernel_shape = [2, 2], strides = [2, 2], ceil_mode = 1> (x) }""", 17, 20, "AveragePool"),
        ("""g (float[2, 3] x, bool b) => (float[2, 1] y) { y = If (b) <
            then_branch = t () => (float[2, 1] a) { a = ReduceMean <axes = [1]> (x) },
            else_branch = e () => (float[2, 1] c) { c = ReduceMax <axes = [1]> (x) }> }""", 17, 20, "subgraph"),
    ],
)  # fmt: skip
def test_refused_by_name(body, opset, version, names):
    reason = refusal(parse(body, opset), version)
    assert reason is not None and names in reason
    assert refusal(parse(body, opset), opset) is None


def test_functions_stay():
    model = parse("g (float[2] x) => (float[2] y) { y = Relu(x) }")
    x = ir.Value(name="a")
    node = ir.node("Abs", [x])
    model.functions[("custom", "F", "")] = ir.Function(
        "custom", "F", graph=ir.Graph([x], [node.outputs[0]], nodes=[node], opset_imports={"": 17}), attributes=[]
    )
    assert "functions" in str(refusal(model, 20))


def test_the_reason_is_reported_and_nothing_is_raised():
    w = Writing({"x": (2, 3, 4)}, 12)
    y = w.call("Softmax", "x", axis=1)
    d = w.call("Sub", y, w.reduce("ReduceMean", y, [2]))
    s = w.call("Sqrt", w.call("Add", w.reduce("ReduceMean", w.call("Mul", d, d), [2]), 1e-5))
    result = fuse(w.model(w.call("Mul", w.call("Div", d, s), np.ones(4))))
    assert result.applied == 0 and result.model.opset_imports[""] == 12
    assert "Softmax" in result.skipped[0].reason


def test_a_newer_model_stays_new():
    w = Writing({"x": (2, 4)}, 25)
    d = w.call("Sub", "x", w.reduce("ReduceMean", "x", [1]))
    s = w.call("Sqrt", w.call("Add", w.reduce("ReduceMean", w.call("Mul", d, d), [1]), 1e-5))
    result = fuse(w.model(w.call("Mul", w.call("Div", d, s), np.linspace(1, 2, 4))))
    assert result.applied == 1 and result.model.opset_imports[""] == 25


@pytest.mark.parametrize("value", [0, 25])
def test_options(value):
    with pytest.raises(ValueError, match="max_opset"):
        FuseOperators(max_opset=value)
