"""CumProd against NumPy, LpNormalization against ONNX Runtime."""

from __future__ import annotations

import numpy as np
import pytest

from tests.targets.oracle import agree, compiled, model, node, sum_tolerance, uniform


@pytest.mark.parametrize("dtype", ["float32", "float64", "int32", "int64"])
@pytest.mark.parametrize("exclusive", [0, 1])
@pytest.mark.parametrize("reverse", [0, 1])
@pytest.mark.parametrize("axis", [0, -1])
def test_cumulative_products(dtype, exclusive, reverse, axis):
    x = (1 + np.abs(uniform(1, 5, 3, 6))).astype(dtype) if dtype[0] == "f" else np.arange(1, 91).reshape(5, 3, 6) % 7
    x = x.astype(dtype)
    constants = {"axis": np.array(axis, np.int64)}
    made = model(
        [node("CumProd", ["x", "axis"], ["y"], exclusive=exclusive, reverse=reverse)], {"x": x}, ["y"], constants, 26
    )
    turned = np.flip(x, axis) if reverse else x
    wanted = np.cumprod(turned, axis=axis, dtype=dtype)
    if exclusive:
        wanted = np.roll(wanted, 1, axis)
        np.moveaxis(wanted, axis, 0)[0] = 1
    wanted = np.flip(wanted, axis) if reverse else wanted
    found = compiled(made, {"x": x})["y"]
    assert found.dtype == dtype
    if dtype[0] == "f":  # as many roundings as factors
        np.testing.assert_allclose(found, wanted, rtol=8 * float(np.finfo(dtype).eps))
    else:
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_norms_of_an_axis(p, axis):
    x = uniform(2, 3, 4, 5)
    x[0, :, 0] = x[:, 1, 1] = x[2, 3] = 0
    agree(model([node("LpNormalization", ["x"], ["y"], p=p, axis=axis)], {"x": x}, ["y"]), {"x": x}, sum_tolerance(5))
