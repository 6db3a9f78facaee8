"""Gelu and Swish: every order of their factors; and constants that are near but not near enough."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.passes.fuse_operators import FuseOperators
from tests.passes.fusing import Writing, fuse, operators

UP_TO_24 = FuseOperators(max_opset=24)


def _gelu(w: Writing, x: str, form: str, order: int, half: float = 0.5, inner: float | None = None, one: float = 1.0):
    """x/2 (1 + erf or tanh), associated in one of six ways."""
    if form == "erf":
        c = math.sqrt(0.5) if inner is None else inner
        u = w.call("Div", x, 1 / c) if order % 2 else w.call("Mul", c, x)
        t = w.call("Erf", u)
    else:
        c = 0.044715 if inner is None else inner
        cube = [
            lambda: w.call("Mul", w.call("Pow", x, 3.0), c),
            lambda: w.call("Mul", x, w.call("Mul", x, w.call("Mul", c, x))),
            lambda: w.call("Mul", c, w.call("Mul", w.call("Mul", x, x), x)),
        ][order % 3]()
        t = w.call("Tanh", w.call("Mul", w.call("Add", x, cube), 0.7978845834732056))
    s = w.call("Add", one, t) if order % 2 else w.call("Add", t, one)
    return [
        lambda: w.call("Mul", w.call("Mul", x, s), half),
        lambda: w.call("Mul", w.call("Mul", x, half), s),
        lambda: w.call("Mul", x, w.call("Mul", half, s)),
        lambda: w.call("Mul", half, w.call("Mul", x, s)),
        lambda: w.call("Mul", s, w.call("Mul", half, x)),
        lambda: w.call("Div", w.call("Mul", s, x), 1 / half),
    ][order]()


@settings(max_examples=24)
@given(
    form=st.sampled_from(["erf", "tanh"]),
    order=st.integers(0, 5),
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    opset=st.sampled_from([11, 13, 17, 20, 23]),
    seed=st.integers(0, 99),
)
def test_gelu(form, order, shape, opset, seed):
    w = Writing({"x": ("N", *shape)}, opset)
    y = _gelu(w, w.call("Identity", "x"), form, order)
    feeds = {"x": (3 * np.random.default_rng(seed).standard_normal((2, *shape))).astype(np.float32)}
    result = fuse(w.model(w.call("Neg", y)), feeds)
    assert operators(result.model)[-2:] == ["Gelu", "Neg"] and len(result.model.graph) <= 3
    (gelu,) = (node for node in result.model.graph if node.op_type == "Gelu")
    assert ("approximate" in gelu.attributes) == (form == "tanh")
    assert result.model.opset_imports[""] == max(opset, 20)


@pytest.mark.parametrize("form", ["erf", "tanh"])
@pytest.mark.parametrize("wrong", [{"half": 0.51}, {"one": 1.1}, {"inner": 0.0447}, {"half": 0.5001}])
def test_other_constants(form, wrong):
    w = Writing({"x": (2, 5)}, 20)
    result = fuse(w.model(_gelu(w, "x", form, 0, **wrong)))
    assert "Gelu" not in operators(result.model)


def test_another_operand_outside():
    w = Writing({"x": (2, 5), "z": (2, 5)}, 20)
    t = w.call("Add", w.call("Erf", w.call("Mul", "x", math.sqrt(0.5))), 1.0)
    assert fuse(w.model(w.call("Mul", w.call("Mul", "z", t), 0.5))).applied == 0


def test_what_broadcasts_stays():
    """Gelu keeps the shape of x; a half of another shape does not."""
    w = Writing({"x": (1, 5)}, 20)
    t = w.call("Add", w.call("Erf", w.call("Mul", "x", math.sqrt(0.5))), 1.0)
    y = w.call("Mul", w.call("Mul", "x", t), np.full((3, 1), 0.5))
    assert fuse(w.model(y)).applied == 0
    w = Writing({"x": (5,)}, 20)
    t = w.call("Add", w.call("Erf", w.call("Mul", "x", math.sqrt(0.5))), np.ones((1, 1)))
    assert fuse(w.model(w.call("Mul", w.call("Mul", "x", t), 0.5))).applied == 0


def test_the_middle_as_an_output_stays():
    w = Writing({"x": (2, 5)}, 20)
    y = _gelu(w, "x", "erf", 0)
    erf = next(node for node in w.nodes if node.op_type == "Erf")
    assert fuse(w.model(y, erf.output[0])).applied == 0


@settings(max_examples=10)
@given(alpha=st.sampled_from([1.0, 1.702, 0.5]), swapped=st.booleans(), opset=st.sampled_from([11, 17, 24]))
def test_swish(alpha, swapped, opset):
    w = Writing({"x": (2, "M", 5)}, opset)
    s = w.call("Sigmoid", w.call("Mul", "x", alpha) if alpha != 1 else "x")
    y = w.call("Mul", s, "x") if swapped else w.call("Mul", "x", s)
    model = w.model(w.call("Neg", y))
    assert fuse(model).applied == 0  # ONNX Runtime expands it: only where asked for
    feeds = {"x": np.random.default_rng(0).standard_normal((2, 3, 5)).astype(np.float32)}
    result = fuse(model, feeds, UP_TO_24)
    assert operators(result.model) == ["Swish", "Neg"]


def test_swish_of_something_else():
    w = Writing({"x": (2, 5), "z": (2, 5)}, 24)
    assert fuse(w.model(w.call("Mul", "z", w.call("Sigmoid", "x"))), rewrite=UP_TO_24).applied == 0
    w = Writing({"x": (2, 5), "z": (2, 5)}, 24)
    shifted = w.call("Sigmoid", w.call("Add", "x", 1.0))
    assert fuse(w.model(w.call("Mul", "x", shifted)), rewrite=UP_TO_24).applied == 0
