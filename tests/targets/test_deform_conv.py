"""DeformConv against ONNX Runtime."""

from __future__ import annotations

import numpy as np
import pytest

from tests.targets.oracle import agree, model, node, sum_tolerance, uniform


@pytest.mark.parametrize(
    ("groups", "own", "masked", "window"),
    [
        (1, 1, False, {}),
        (1, 2, True, {"pads": [1, 1, 1, 1]}),
        (2, 1, True, {"strides": [2, 1], "pads": [1, 0, 1, 0]}),
        (2, 2, False, {"dilations": [2, 1], "pads": [2, 1, 2, 1]}),
    ],
)
def test_taps_between_elements(groups, own, masked, window):
    """Some of the places lie outside of the picture, some far outside."""
    size, kernel = (7, 8), (3, 3)
    strides, dilations = window.get("strides", [1, 1]), window.get("dilations", [1, 1])
    pads = window.get("pads", [0, 0, 0, 0])
    out = [(size[a] + pads[a] + pads[a + 2] - dilations[a] * 2 - 1) // strides[a] + 1 for a in (0, 1)]
    offset = 3 * uniform(2, 2, 2 * own * 9, *out)
    offset[0, 0, 0, 0] = 1e9
    feeds = {"x": uniform(1, 2, 4, *size), "w": uniform(3, 6, 4 // groups, *kernel), "o": offset, "b": uniform(4, 6)}
    names = ["x", "w", "o", "b"]
    if masked:
        feeds["m"] = np.abs(uniform(5, 2, own * 9, *out))
        names.append("m")
    made = model(
        [node("DeformConv", names, ["y"], group=groups, offset_group=own, kernel_shape=kernel, **window)],
        feeds,
        ["y"],
        opset=19,
    )
    # Shares of the four elements are differences of places up to 10: their rounding is 16 times that of a product.
    agree(made, feeds, 16 * sum_tolerance(9 * 4 // groups))
