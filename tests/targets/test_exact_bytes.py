"""Quantized operators whose scales and weights are known at run time only."""

from __future__ import annotations

import numpy as np
import pytest

from tests.targets.oracle import agree, compiled, model, node, uniform


def _bytes(seed: int, dtype: str, *shape: int) -> np.ndarray:
    info = np.iinfo(dtype)
    return np.random.default_rng(seed).integers(info.min, info.max, shape, dtype=dtype, endpoint=True)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "uint16"])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_scale_a_block(dtype, axis):
    scale = np.abs(uniform(1, *(2 if i == axis else n for i, n in enumerate((6, 8))))) / 50 + 0.01
    zero = _bytes(2, dtype, *scale.shape)
    block = 3 if axis == 0 else 4
    feeds = {"x": uniform(3, 6, 8), "s": scale.astype(np.float32), "z": zero}
    window = {"axis": axis, "block_size": block}
    made = model([node("QuantizeLinear", list(feeds), ["y"], **window)], feeds, ["y"], opset=21)
    agree(made, feeds, 0)
    feeds["x"] = _bytes(4, dtype, 6, 8)
    made = model([node("DequantizeLinear", list(feeds), ["y"], **window)], feeds, ["y"], opset=21)
    agree(made, feeds, 0)


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
@pytest.mark.parametrize("batch", [(), (3,)])
def test_a_product_with_scales_of_few_digits(dtype, batch):
    """Within one unit of float64's result where that is a tie but for the rounding of the scales' product."""
    a, b = _bytes(1, dtype, *batch, 5, 16), _bytes(2, dtype, *batch, 16, 7)
    points = {name: _bytes(seed, dtype, 1) for seed, name in enumerate(("az", "bz", "yz"))}
    scales = {name: np.array([value], np.float16) for name, value in (("as", 0.02), ("bs", 0.013), ("ys", 0.6))}
    feeds = {"a": a, "b": b, **points, **scales}
    names = ["a", "as", "az", "b", "bs", "bz", "ys", "yz"]
    made = model([node("QLinearMatMul", names, ["y"])], feeds, ["y"], opset=21)
    factor = float(scales["as"][0]) * float(scales["bs"][0]) / float(scales["ys"][0])
    sums = (a.astype(int) - int(points["az"][0])) @ (b.astype(int) - int(points["bz"][0]))
    exact = sums * factor + int(points["yz"][0])
    info = np.iinfo(dtype)
    found = compiled(made, feeds)["y"]
    assert found.dtype == dtype
    assert np.abs(found - np.clip(exact, info.min, info.max)).max() <= 0.5 + 1e-4


@pytest.mark.parametrize(("groups", "window"), [(1, {}), (2, {"pads": [1, 0, 1, 2], "strides": [2, 1]})])
def test_an_integer_convolution_with_weights_of_run_time(groups, window):
    feeds = {
        "x": _bytes(1, "uint8", 2, 4, 6, 7),
        "w": _bytes(2, "uint8", 6, 4 // groups, 3, 2),
        "xz": np.array(100, np.uint8),
        "wz": np.array(77, np.uint8),
    }
    made = model([node("ConvInteger", list(feeds), ["y"], group=groups, **window)], feeds, ["y"])
    agree(made, feeds, 0)
