"""InstanceNormalization, LayerNormalization and RMSNormalization, however they are written; and what only looks so."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.passes.fuse_operators import FuseOperators
from tests.passes.fusing import Writing, fuse, operators


@dataclass(frozen=True)
class Style:
    """How a normalization is written."""

    centred: bool = True
    square: str = "mul"
    """mul, pow."""
    variance: str = "differences"
    """differences: mean((x - m)^2); moments: mean(x^2) - m^2; clamped: that, at least 0."""
    mean: str = "mean"
    """mean: ReduceMean; sum: ReduceSum times 1/n; over: ReduceSum / n."""
    keeps: bool = True
    """keepdims=1, or 0 and a Reshape."""
    root: str = "sqrt"
    """sqrt, pow."""
    division: str = "div"
    """div: d / s * w; reciprocal: d * (1/s) * w; weighted: d * (1/s * w)."""
    swapped: bool = False
    bias: bool = True


styles = st.builds(
    Style,
    centred=st.booleans(),
    square=st.sampled_from(["mul", "pow"]),
    variance=st.sampled_from(["differences", "moments", "clamped"]),
    mean=st.sampled_from(["mean", "sum", "over"]),
    keeps=st.booleans(),
    root=st.sampled_from(["sqrt", "pow"]),
    division=st.sampled_from(["div", "reciprocal", "weighted"]),
    swapped=st.booleans(),
    bias=st.booleans(),
)


def written(style: Style, shape, axes, weight, bias, epsilon: float, opset: int = 17) -> Writing:
    """`weight` and `bias` broadcast to `shape`; the result is the last node's."""
    w = Writing({"x": ("N", *shape[1:])}, opset)

    def pair(op: str, a, b):
        return w.call(op, b, a) if style.swapped else w.call(op, a, b)

    def mean(value: str) -> str:
        count = float(np.prod([shape[axis] for axis in axes]))
        keep = int(style.keeps)
        if style.mean == "mean":
            made = w.reduce("ReduceMean", value, axes, keep)
        else:
            total = w.reduce("ReduceSum", value, axes, keep)
            made = pair("Mul", total, 1 / count) if style.mean == "sum" else w.call("Div", total, count)
        return made

    def back(value: str) -> str:
        if style.keeps:
            return value
        return w.call(
            "Reshape", value, np.array([1 if a in axes else -1 if a == 0 else s for a, s in enumerate(shape)])
        )

    def squared(value: str) -> str:
        return w.call("Mul", value, value) if style.square == "mul" else w.call("Pow", value, 2.0)

    d = "x"
    if style.centred:
        average = mean("x")
        d = w.call("Sub", "x", back(average))
        if style.variance == "differences":
            spread = mean(squared(d))
        else:
            spread = w.call("Sub", mean(squared("x")), squared(average))
            spread = spread if style.variance == "moments" else pair("Max", spread, 0.0)
    else:
        spread = mean(squared("x"))
    slack = pair("Add", back(spread), epsilon)
    s = w.call("Sqrt", slack) if style.root == "sqrt" else w.call("Pow", slack, 0.5)
    if style.division == "div":
        y = pair("Mul", w.call("Div", d, s), weight)
    elif style.division == "reciprocal":
        y = pair("Mul", pair("Mul", d, w.call("Reciprocal", s)), weight)
    else:
        y = pair("Mul", d, pair("Mul", w.call("Reciprocal", s), weight))
    if style.bias and style.centred:
        y = pair("Add", y, bias)
    w.call("Relu", y)
    return w


def _result(w: Writing) -> str:
    return w.nodes[-1].output[0]


@settings(max_examples=25)
@given(
    style=styles,
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    last=st.integers(2, 40),
    count=st.integers(1, 2),
    epsilon=st.sampled_from([1e-12, 1e-6, 1e-5, 1e-3]),
    seed=st.integers(0, 99),
)
def test_over_the_last_axes(style, lengths, last, count, epsilon, seed):
    rng = np.random.default_rng(seed)
    shape = (*lengths, last)
    count = min(count, len(shape) - 1) if len(shape) > 1 else 1
    if len(shape) == 1:
        shape = (3, last)
    axes = list(range(len(shape) - count, len(shape)))
    size = tuple(shape[axis] for axis in axes)
    weight, bias = rng.uniform(0.5, 2, size), rng.standard_normal(size)
    w = written(style, shape, axes, weight, bias, epsilon)
    model = w.model(_result(w))
    feeds = {"x": (rng.standard_normal(shape) + 0.1).astype(np.float32)}
    result = fuse(model, feeds)
    kind = "LayerNormalization" if style.centred else "RMSNormalization"
    assert operators(result.model) == [kind, "Relu"]
    (node, _) = result.model.graph
    assert node.attributes["epsilon"].value == pytest.approx(epsilon)
    assert result.model.opset_imports[""] == (17 if style.centred else 23)


@settings(max_examples=15)
@given(
    style=styles.filter(lambda s: s.centred),
    shape=st.tuples(st.integers(1, 2), st.integers(2, 5), st.integers(2, 7), st.integers(1, 7)),
    seed=st.integers(0, 99),
)
def test_over_an_image(style, shape, seed):
    """One mean a channel, scale and bias too: InstanceNormalization, in any opset."""
    rng = np.random.default_rng(seed)
    weight, bias = rng.uniform(0.5, 2, (1, shape[1], 1, 1)), rng.standard_normal((shape[1], 1, 1))
    w = written(style, shape, [2, 3], weight, bias, 1e-5, opset=13)
    feeds = {"x": rng.standard_normal(shape).astype(np.float32)}
    result = fuse(w.model(_result(w)), feeds)
    assert operators(result.model) == ["InstanceNormalization", "Relu"]
    assert result.model.opset_imports[""] == 13


def test_over_a_middle_axis_is_transposed_and_back():
    rng = np.random.default_rng(0)
    w = written(Style(), (2, 6, 4), [1], rng.uniform(1, 2, (6, 1)), rng.standard_normal((6, 1)), 1e-5)
    result = fuse(w.model(_result(w)), {"x": rng.standard_normal((2, 6, 4)).astype(np.float32)})
    assert operators(result.model) == ["Transpose", "LayerNormalization", "Transpose", "Relu"]


SHAPE, AXES = (2, 3, 8), [2]
WEIGHT, BIAS = np.linspace(1, 2, 8), np.linspace(-1, 1, 8)


@pytest.mark.parametrize("style", [Style(), Style(centred=False), Style(variance="clamped", keeps=False)])
def test_epsilon_must_be_positive_and_small(style):
    for epsilon in (0.0, -1e-5, 2.0):
        w = written(style, SHAPE, AXES, WEIGHT, BIAS, epsilon)
        assert fuse(w.model(_result(w))).applied == 0


def test_a_value_in_between_that_is_an_output_stays():
    w = written(Style(), SHAPE, AXES, WEIGHT, BIAS, 1e-5)
    for node in w.nodes[:-2]:
        if node.op_type in ("ReduceMean", "Sub", "Sqrt"):
            result = fuse(w.model(_result(w), node.output[0]))
            assert result.applied == 0, node.op_type


def test_a_value_in_between_that_somebody_else_reads_stays():
    w = written(Style(), SHAPE, AXES, WEIGHT, BIAS, 1e-5)
    root = next(node for node in w.nodes if node.op_type == "Sqrt")
    other = w.call("Neg", root.output[0])
    assert fuse(w.model(w.nodes[-2].output[0], other)).applied == 0


@pytest.mark.parametrize(
    "wrong",
    [
        "axes of the variance",
        "mean of another value",
        "another difference",
        "divisor",
        "weight a sample",
        "exponent",
        "count",
    ],
)
def test_what_only_looks_like_one(wrong):
    w = Writing({"x": SHAPE, "z": SHAPE}, 17)
    mean = w.reduce("ReduceMean", "z" if wrong == "mean of another value" else "x", [2])
    d = w.call("Sub", "x", mean)
    squares = w.call("Pow", d, 3.0 if wrong == "exponent" else 2.0)
    axes = [1] if wrong == "axes of the variance" else [2]
    if wrong == "count":
        spread = w.call("Mul", w.reduce("ReduceSum", squares, axes), 1 / 7)
    else:
        spread = w.reduce("ReduceMean", squares, axes)
    s = w.call("Sqrt", w.call("Add", spread, 1e-5))
    other = w.call("Sub", "z", mean) if wrong == "another difference" else d
    y = w.call("Div", s, other) if wrong == "divisor" else w.call("Div", other, s)
    y = w.call("Mul", y, np.linspace(1, 2, 2).reshape(2, 1, 1) if wrong == "weight a sample" else WEIGHT)
    w.call("Relu", y)
    result = fuse(w.model(_result(w)), {name: np.random.default_rng(0).random(SHAPE, np.float32) for name in "xz"})
    found = {"LayerNormalization", "RMSNormalization", "InstanceNormalization"} & set(operators(result.model))
    assert found == ({"RMSNormalization"} if wrong == "mean of another value" else set())  # it is one, of x - that mean


def test_double_precision_stays():
    body = """g (double[2, 8] x) => (double[2, 8] y) <double e = {1e-5}, double two = {2}> {
        s = Pow(x, two) m = ReduceMean <axes = [-1]> (s) a = Add(m, e) r = Sqrt(a) y = Div(x, r) }"""
    from tests.rewrites.pairs import stays

    stays(FuseOperators(), body)


def test_no_newer_opset_than_allowed():
    w = written(replace(Style(), centred=False), SHAPE, AXES, WEIGHT, BIAS, 1e-5)
    model = w.model(_result(w))
    assert fuse(model, rewrite=FuseOperators(max_opset=22)).applied == 0
    assert fuse(model, rewrite=FuseOperators(max_opset=23)).applied == 1
