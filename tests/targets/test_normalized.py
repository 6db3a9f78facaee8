"""A layer normalization between products: the residual added and bytes made in its own pass."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.targets.relax import pipeline
from tests.targets.integer_models import integer_weight, quantized
from tests.targets.oracle import TARGET, compiled, model, node, reference, uniform

CASES = settings(max_examples=12, deadline=None)
STEP = 6 / 255


def block(rows: int, width: int, columns: int, *, factors: bool, residual: bool, order: int, reads_float: bool):
    """bytes -> MatMul -> Add of x -> LayerNormalization (-> Mul) -> bytes -> MatMul (-> Add of the normalization)."""
    feeds = {"x": uniform(1, 1, rows, width)}
    nodes, constants = quantized("x", 2 / 255, 128)
    for name, source, shape in (("w", "xd", (width, width)), ("u", "nd", (width, columns))):
        weight = uniform(len(constants), *shape) / np.float32(np.sqrt(shape[0]))
        made, held = integer_weight(name, weight, 1)
        constants.update(held)
        if name == "u":
            value = "n"
            if factors:
                constants["f"] = np.abs(uniform(8, width)) + np.float32(0.5)
                nodes.append(node("Mul", ["n", "f"] if order else ["f", "n"], ["nf"]))
                value = "nf"
            pair, held = quantized(value, STEP, 128)
            constants.update(held)
            nodes += pair
            source = value + "d"
        nodes += [made, node("MatMul", [source, name + "d"], [name + "p"])]
        if name == "w":
            constants |= {"b": uniform(6, width), "s": uniform(4, width) + np.float32(1.5), "t": uniform(5, width)}
            nodes.append(node("Add", ["wp", "b"], ["h"]))
            total = "h"
            if residual:
                nodes.append(node("Add", ["h", "x"] if order else ["x", "h"], ["r"]))
                total = "r"
            nodes.append(node("LayerNormalization", [total, "s", "t"], ["n"], epsilon=1e-5))
    if reads_float:
        nodes.append(node("Add", ["up", "n"], ["y"]))
    return model(nodes, feeds, ["y" if reads_float else "up"], constants), feeds


@CASES
@given(
    rows=st.sampled_from([1, 2, 7, 16, 33]),
    width=st.sampled_from([16, 20, 33, 64, 100]),
    columns=st.sampled_from([8, 24]),
    factors=st.booleans(),
    residual=st.booleans(),
    order=st.integers(0, 1),
    reads_float=st.booleans(),
)
def test_against_onnxruntime(rows, width, columns, factors, residual, order, reads_float):
    columns = width if reads_float else columns
    how = {"factors": factors, "residual": residual, "order": order, "reads_float": reads_float}
    made, feeds = block(rows, width, columns, **how)
    (wanted,), (found,) = reference(made, feeds).values(), compiled(made, feeds).values()
    assert found.shape == wanted.shape
    largest = 1 / np.sqrt(width)
    assert np.abs(found - wanted).max() <= 4 * STEP * largest + 1e-4  # a few numbers at ties, one quantum each
    assert np.median(np.abs(found - wanted)) <= 1e-5 * max(1.0, np.abs(wanted).max())


@pytest.mark.parametrize("factors", [False, True])
def test_one_kernel_does_it_all(factors):
    made, _ = block(8, 64, 64, factors=factors, residual=True, order=0, reads_float=True)
    names = list(pipeline.prim_funcs(TARGET.lower(made).module))
    assert sum("layer_norm" in name for name in names) == 1, names
    assert not any("multiply" in name for name in names), names
    unblocked = [name for name in names if "unblock" in name]
    assert len(unblocked) == 1, names  # of the last product
