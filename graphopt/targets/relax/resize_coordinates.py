"""Where the outputs of Resize lie among its inputs, and which cell is the nearest.

All of it in float32, as ONNX Runtime computes it, so that a neighbour that falls on a tie is the same one.

Each function of coordinates takes the outputs' places x, the axis' size before and after, and its scale.
"""

from __future__ import annotations

import numpy as np

F = np.float32


def _half_pixel(x, size: int, out: int, scale):
    return (x + F(0.5)) / scale - F(0.5)


def _half_pixel_symmetric(x, size: int, out: int, scale):
    adjustment = F(out) / (scale * F(size))
    return F(size) / F(2) * (F(1) - adjustment) + (x + F(0.5)) / scale - F(0.5)


def _pytorch_half_pixel(x, size: int, out: int, scale):
    return (x + F(0.5)) / scale - F(0.5) if out > 1 else np.zeros_like(x)


def _align_corners(x, size: int, out: int, scale):
    return x * F(size - 1) / F(out - 1) if out > 1 else np.zeros_like(x)


def _asymmetric(x, size: int, out: int, scale):
    return x / scale


COORDINATES = {
    "half_pixel": _half_pixel,
    "half_pixel_symmetric": _half_pixel_symmetric,
    "pytorch_half_pixel": _pytorch_half_pixel,
    "align_corners": _align_corners,
    "asymmetric": _asymmetric,
}
ROUNDINGS = {
    "round_prefer_floor": lambda x: np.ceil(x - F(0.5)),
    "round_prefer_ceil": lambda x: np.floor(x + F(0.5)),
    "floor": np.floor,
    "ceil": np.ceil,
}
