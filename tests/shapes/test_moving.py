"""Nodes that only move elements, evaluated without the runtime: the same as with it, or left to it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt import graph as g
from graphopt.shapes.moving import moved
from tests.passes.oracle import random_feeds, run
from tests.rewrites.pairs import parse

NODES = [
    ("Identity (x)", 17),
    ("Reshape (x, t)", 17),
    ("Squeeze (u, o)", 17),
    ("Squeeze <axes = [0]> (u)", 11),
    ("Squeeze (u)", 17),
    ("Unsqueeze (x, o)", 17),
    ("Unsqueeze <axes = [0, 3]> (x)", 11),
    ("Flatten <axis = 2> (x)", 17),
    ("Flatten <axis = 0> (x)", 17),
    ("Transpose (x)", 17),
    ("Transpose <perm = [1, 2, 0]> (x)", 17),
    ("Concat <axis = -1> (x, x)", 17),
    ("Slice (x, m, e, o, w)", 17),
    ("Slice (x, m, e)", 17),
    ("Gather <axis = 1> (x, i)", 17),
    ("Gather (x, k)", 17),
    ("Shape (x)", 17),
    ("Shape <start = 1> (x)", 17),
]


@settings(max_examples=40)
@given(
    case=st.sampled_from(NODES), kind=st.sampled_from(["float", "int64", "int32", "bool"]),
    shape=st.tuples(st.integers(1, 3), st.integers(2, 4), st.integers(2, 5)),
)  # fmt: skip
def test_as_the_runtime_does(case, kind, shape):
    text, opset = case
    a, b, c = shape
    out = "int64" if text.startswith("Shape") else kind
    axes = ", ".join("ABCDE"[: _rank(text)])
    first = 0 if text.startswith("Squeeze") else 1
    model = parse(
        f"""g ({kind}[{a}, {b}, {c}] x, {kind}[1, {b}, {c}] u) => ({out}[{axes}] y)
        <int64[2] t = {{0, -1}}, int64[1] o = {{{first}}}, int64[1] m = {{-2}}, int64[1] e = {{9}}, int64[1] w = {{2}},
         int64[2, 2] i = {{0, 1, -1, 0}}, int64 k = {{-1}}> {{ y = {text} }}""",
        opset,
    )
    feeds = random_feeds(model, {})
    (node,) = model.graph
    operands = [feeds[str(v.name)] if v.name in feeds else g.constant_of(v) for v in node.inputs if v is not None]
    found = moved(node, operands, opset)
    (wanted,) = run(model, feeds)
    assert found is not None and found.dtype == wanted.dtype and found.shape == wanted.shape
    np.testing.assert_array_equal(found, wanted)


def _rank(text: str) -> int:
    op = text.split()[0]
    if op == "Unsqueeze":
        return 5 if "[0, 3]" in text else 4
    if op == "Gather":
        return 4 if "i)" in text else 2
    return {"Flatten": 2, "Reshape": 2, "Shape": 1, "Squeeze": 2}.get(op, 3)


@pytest.mark.parametrize(
    "body",
    [
        "g (float[2, 3] x) => (float[2, 3] y) <int64[1] i = {5}> { y = Gather(x, i) }",
        "g (float[2, 3] x) => (float[2, 4] y) <int64[2] i = {2, 4}> { y = Reshape(x, i) }",
        "g (float[2, 3] x) => (float[2, 3] y) { y = Relu(x) }",
        """g (float[2, 3] x) => (float[2, 3] y) <int64[1] a = {1}, int64[1] b = {-9}, int64[1] s = {-1}> {
            y = Slice(x, a, b, a, s) }""",
    ],
)
def test_the_rest_is_left_to_the_runtime(body):
    model = ir.from_onnx_text(f'<ir_version: 8, opset_import: ["" : 17]>\n{body}')
    (node,) = model.graph
    operands = [np.zeros((2, 3), np.float32), *(g.constant_of(v) for v in list(node.inputs)[1:])]
    assert moved(node, operands, 17) is None
