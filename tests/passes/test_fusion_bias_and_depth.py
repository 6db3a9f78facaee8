"""Bias into Conv and Gemm; Reshape, Transpose, Reshape as DepthToSpace."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.passes.fusing import Writing, fuse, operators


@settings(max_examples=15)
@given(
    op=st.sampled_from(["Conv", "ConvTranspose"]),
    groups=st.sampled_from([1, 2]),
    form=st.sampled_from(["C11", "1C11", "one", "scalar"]),
    swapped=st.booleans(),
    opset=st.sampled_from([7, 11, 17, 22]),
)
def test_bias_of_a_convolution(op, groups, form, swapped, opset):
    rng = np.random.default_rng(0)
    w = Writing({"x": ("N", 4, 5, 5)}, opset)
    y = w.call(
        op,
        "x",
        rng.standard_normal((4 if op == "ConvTranspose" else 6, 3 if op == "ConvTranspose" else 4 // groups, 3, 3)),
        group=groups,
    )
    channels = 3 * groups if op == "ConvTranspose" else 6
    shape = {"C11": (channels, 1, 1), "1C11": (1, channels, 1, 1), "one": (1,), "scalar": ()}[form]
    bias = rng.standard_normal(shape)
    z = w.call("Add", bias, y) if swapped else w.call("Add", y, bias)
    feeds = {"x": rng.standard_normal((2, 4, 5, 5)).astype(np.float32)}
    assert operators(fuse(w.model(w.call("Relu", z)), feeds).model) == [op, "Relu"]


@settings(max_examples=15)
@given(rows=st.integers(1, 4), inner=st.integers(1, 9), columns=st.integers(1, 9),
       form=st.sampled_from(["N", "1N", "1", "scalar"]))  # fmt: skip
def test_bias_of_a_product(rows, inner, columns, form):
    rng = np.random.default_rng(rows)
    w = Writing({"x": ("M", inner)}, 13)
    shape = {"N": (columns,), "1N": (1, columns), "1": (1,), "scalar": ()}[form]
    y = w.call("Add", w.call("MatMul", "x", rng.standard_normal((inner, columns))), rng.standard_normal(shape))
    feeds = {"x": rng.standard_normal((rows, inner)).astype(np.float32)}
    assert operators(fuse(w.model(w.call("Relu", y)), feeds).model) == ["Gemm", "Relu"]


@pytest.mark.parametrize(
    "wrong", ["rows", "spatial", "has a bias", "stack", "computed", "more rows", "read twice", "output"]
)  # fmt: skip
def test_no_bias(wrong):
    rng = np.random.default_rng(0)
    w = Writing({"x": (1, 3, 4, 4), "a": (2, 3), "s": (2, 2, 3), "b": (5,)}, 17)
    kernel, matrix = rng.standard_normal((4, 3, 1, 1)), rng.standard_normal((3, 5))
    outputs = []
    if wrong in ("spatial", "has a bias"):
        y = w.call("Conv", "x", kernel, *([np.ones(4)] if wrong == "has a bias" else []))
        y = w.call("Add", y, np.arange(4.0) if wrong == "spatial" else np.ones((4, 1, 1)))
    else:
        product = w.call("MatMul", "s" if wrong == "stack" else "a", matrix)
        bias = {"rows": np.ones((2, 1)), "computed": "b", "more rows": np.ones((2, 5))}.get(wrong, np.ones(5))
        y = w.call("Add", product, bias)
        outputs = [w.call("Neg", product)] if wrong == "read twice" else [product] if wrong == "output" else []
    assert fuse(w.model(w.call("Relu", y), *outputs)).applied == 0


@settings(max_examples=20)
@given(
    channels=st.integers(1, 3), size=st.integers(2, 3), height=st.integers(1, 4), width=st.integers(1, 4),
    mode=st.sampled_from(["CRD", "DCR"]), opset=st.sampled_from([10, 13]), batch=st.sampled_from([2, "N"]),
)  # fmt: skip
def test_pixel_shuffle(channels, size, height, width, mode, opset, batch):
    w = Writing({"x": (batch, channels * size * size, height, width)}, opset)
    six = [channels, size, size] if mode == "CRD" else [size, size, channels]
    opened = w.call("Reshape", w.call("Relu", "x"), np.array([-1, *six, height, width]))
    moved = w.call("Transpose", opened, perm=[0, 1, 4, 2, 5, 3] if mode == "CRD" else [0, 3, 4, 1, 5, 2])
    y = w.call("Reshape", moved, np.array([-1, channels, height * size, width * size]))
    feeds = {
        "x": np.random.default_rng(0).standard_normal((2, channels * size * size, height, width)).astype(np.float32)
    }
    result = fuse(w.model(w.call("Neg", y)), feeds)
    old_form = opset == 10 and mode == "CRD" and channels > 1
    if (height, width) != (1, 1) and not old_form:
        assert operators(result.model) == ["Relu", "DepthToSpace", "Neg"]
    if old_form:  # opset 10 knows no mode, and is not raised
        assert "DepthToSpace" not in operators(result.model)


@pytest.mark.parametrize(
    ("six", "perm", "last"),
    [
        ([2, 3, 3, 4, 5], [0, 1, 5, 2, 4, 3], [2, 15, 12]),  # rows and columns exchanged
        ([2, 3, 3, 4, 5], [0, 1, 4, 3, 5, 2], [2, 12, 15]),  # the two parts of a pixel exchanged
        ([2, 3, 3, 4, 5], [0, 1, 4, 2, 5, 3], [2, 15, 12]),  # another last shape
        ([1, 2, 9, 4, 5], [0, 1, 4, 2, 5, 3], [1, 8, 45]),  # no square
    ],
)
def test_other_shuffles(six, perm, last):
    w = Writing({"x": (2, 18, 4, 5)}, 13)
    moved = w.call("Transpose", w.call("Reshape", "x", np.array([2, *six])), perm=perm)
    result = fuse(w.model(w.call("Neg", w.call("Reshape", moved, np.array([2, *last])))))
    assert "DepthToSpace" not in operators(result.model)
