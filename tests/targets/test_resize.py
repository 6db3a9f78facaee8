"""Resize against ONNX Runtime: nearest to the bit, bilinear within rounding, in every coordinate mode that is ours."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.errors import GraphoptError
from graphopt.targets.relax import pipeline
from tests.targets.oracle import EPSILON, TARGET, close, compiled, model, node, reference, uniform

COORDINATES = ("half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric")
ROUNDINGS = ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil")
BLEND_TOLERANCE = 8 * EPSILON
"""Two lerps: three roundings each way on products of numbers below the largest magnitude; weights carry one more."""
CASES = settings(max_examples=25, deadline=None)


def resized(x, factors, *, by_size: bool = False, **attributes):
    constants = {"scales": np.asarray([1, 1, *factors], np.float32)}
    inputs = ["x", "", "scales"]
    if by_size:
        constants = {"sizes": np.asarray([*x.shape[:2], *factors], np.int64)}
        inputs = ["x", "", "", "sizes"]
    return model([node("Resize", inputs, ["y"], **attributes)], {"x": x}, ["y"], constants)


@CASES
@given(
    channels=st.sampled_from([1, 3, 8, 20]),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    out=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    coordinates=st.sampled_from(COORDINATES),
    rounding=st.sampled_from(ROUNDINGS),
)
def test_nearest_takes_the_same_cells(channels, size, out, coordinates, rounding):
    x = uniform(1, 2, channels, *size)
    made = resized(
        x, out, by_size=True, mode="nearest", coordinate_transformation_mode=coordinates, nearest_mode=rounding
    )
    np.testing.assert_array_equal(compiled(made, {"x": x})["y"], reference(made, {"x": x})["y"])


@CASES
@given(
    channels=st.sampled_from([1, 3, 8, 20]),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    factors=st.tuples(st.sampled_from([1, 2, 3, 4, 1.5, 2.25]), st.sampled_from([1, 2, 3, 4, 1.5, 2.25])),
    coordinates=st.sampled_from(COORDINATES),
)
def test_linear_blends_the_same_cells(channels, size, factors, coordinates):
    x = uniform(1, 1, channels, *size)
    made = resized(x, factors, mode="linear", coordinate_transformation_mode=coordinates)
    close(compiled(made, {"x": x}), reference(made, {"x": x}), BLEND_TOLERANCE)


@pytest.mark.parametrize("mode", ["nearest", "linear"])
def test_between_convolutions_it_stays_in_blocked_form(mode):
    x = uniform(1, 1, 16, 5, 6)
    constants = {
        "w": uniform(2, 16, 16, 1, 1),
        "v": uniform(3, 16, 16, 1, 1),
        "scales": np.asarray([1, 1, 2, 2], np.float32),
    }
    nodes = [
        node("Conv", ["x", "w"], ["a"]),
        node("Resize", ["a", "", "scales"], ["b"], mode=mode),
        node("Add", ["b", "b"], ["c"]),
        node("Conv", ["c", "v"], ["y"]),
    ]
    made = model(nodes, {"x": x}, ["y"], constants)
    names = list(pipeline.prim_funcs(TARGET.lower(made).module))
    assert sum("block_channels" in name for name in names) == 2  # in and out of the model
    close(compiled(made, {"x": x}), reference(made, {"x": x}), 64 * EPSILON)


def test_cubic_is_not_taken_for_linear():
    """It goes to TVM's own importer, or is refused; it must not come out wrong."""
    x = uniform(1, 1, 3, 6, 6)
    made = resized(x, (2, 2), mode="cubic")
    try:
        found = compiled(made, {"x": x})
    except GraphoptError:
        return
    close(found, reference(made, {"x": x}), 1e-4)
