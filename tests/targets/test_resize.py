"""Resize against ONNX Runtime: nearest to the bit, bilinear within rounding, in every coordinate mode that is ours."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from graphopt.errors import GraphoptError
from graphopt.targets.relax import pipeline
from tests.targets.oracle import EPSILON, TARGET, close, compiled, model, node, reference, uniform

COORDINATES = ("half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric")
ROUNDINGS = ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil")
BLEND_TOLERANCE = 8 * EPSILON
"""Two lerps: three roundings each way on products of numbers below the largest magnitude; weights carry one more."""
CASES = settings(max_examples=25, deadline=None)


def resized(x, factors, *, by_size: bool = False, opset: int = 17, **attributes):
    constants = {"scales": np.asarray([1, 1, *factors], np.float32)}
    inputs = ["x", "", "scales"]
    if by_size:
        constants = {"sizes": np.asarray([*x.shape[:2], *factors], np.int64)}
        inputs = ["x", "", "", "sizes"]
    return model([node("Resize", inputs, ["y"], **attributes)], {"x": x}, ["y"], constants, opset)


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


CUBIC_TOLERANCE = 32 * EPSILON
"""Two sums of four products each, whose weights add up to 1 and in magnitude to 1.75 at most; and weights that are
polynomials in float32 on the other side."""


@CASES
@given(
    size=st.tuples(st.integers(2, 9), st.integers(2, 9)),
    factors=st.tuples(st.sampled_from([0.5, 0.6, 1, 2, 2.25]), st.sampled_from([0.5, 0.8, 1, 1.5, 3])),
    coordinates=st.sampled_from(["half_pixel", "pytorch_half_pixel", "asymmetric", "align_corners"]),
    exclude=st.booleans(),
    a=st.sampled_from([-0.75, -0.5]),
)
def test_cubic(size, factors, coordinates, exclude, a):
    x = uniform(1, 1, 3, *size)
    assume(min(int(np.float32(n) * np.float32(f)) for n, f in zip(size, factors, strict=True)) > 0)
    made = resized(
        x,
        factors,
        mode="cubic",
        coordinate_transformation_mode=coordinates,
        exclude_outside=int(exclude),
        cubic_coeff_a=a,
    )
    close(compiled(made, {"x": x}), reference(made, {"x": x}), CUBIC_TOLERANCE)


@pytest.mark.parametrize("mode", ["linear", "cubic"])
@pytest.mark.parametrize("out", [(3, 4), (5, 2), (9, 12)])
def test_antialias_widens_the_filter(mode, out):
    x = uniform(1, 2, 3, 8, 11)
    made = resized(x, out, by_size=True, mode=mode, antialias=1, opset=18)
    close(compiled(made, {"x": x}), reference(made, {"x": x}), CUBIC_TOLERANCE)


@pytest.mark.parametrize("policy", ["stretch", "not_larger", "not_smaller"])
@pytest.mark.parametrize("axes", [(2, 3), (3, 2)])
def test_some_axes_in_some_order(axes, policy):
    x = uniform(1, 1, 2, 5, 7)
    constants = {"sizes": np.array([8, 9], np.int64)}
    made = model(
        [node("Resize", ["x", "", "", "sizes"], ["y"], axes=axes, keep_aspect_ratio_policy=policy)],
        {"x": x},
        ["y"],
        constants,
        opset=18,
    )
    np.testing.assert_array_equal(compiled(made, {"x": x})["y"], reference(made, {"x": x})["y"])


@pytest.mark.parametrize("mode", ["nearest", "linear"])
def test_a_region_of_the_picture_and_what_is_outside(mode):
    x = uniform(1, 1, 2, 6, 5)
    constants = {
        "roi": np.array([0, 0, 0.2, -0.3, 1, 1, 0.7, 1.2], np.float32),
        "sizes": np.array([1, 2, 4, 9], np.int64),
    }
    attributes = {"mode": mode, "coordinate_transformation_mode": "tf_crop_and_resize", "extrapolation_value": 7.0}
    made = model([node("Resize", ["x", "roi", "", "sizes"], ["y"], **attributes)], {"x": x}, ["y"], constants)
    wanted = reference(made, {"x": x})
    assert (wanted["y"] == 7).any()
    close(compiled(made, {"x": x}), wanted, BLEND_TOLERANCE)


@pytest.mark.parametrize("mode", ["nearest", "linear"])
@pytest.mark.parametrize("shape", [(1, 2, 7), (1, 2, 3, 4, 5)])
def test_pictures_of_one_and_three_dimensions(shape, mode):
    x = uniform(1, *shape)
    scales = np.array([1, 1, 2, 1.5, 0.5][: len(shape)], np.float32)
    made = model([node("Resize", ["x", "", "scales"], ["y"], mode=mode)], {"x": x}, ["y"], {"scales": scales})
    close(compiled(made, {"x": x}), reference(made, {"x": x}), BLEND_TOLERANCE)


def test_how_bytes_are_blended_is_not_defined():
    x = np.zeros((1, 3, 4, 4), np.uint8)
    with pytest.raises(GraphoptError, match="Resize"):
        compiled(resized(x, (2, 2), mode="linear"), {"x": x})
