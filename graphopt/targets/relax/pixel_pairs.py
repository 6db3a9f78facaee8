"""The first layer of a network for graphics processors: pictures of a few channels as pairs of neighbouring pixels.

A pixel of three channels is six bytes of float16, and what copies 16 bytes at a time cannot read it. Two neighbours,
padded to four channels each, are 16 bytes. Where the stride along a row is 2, a window of kW pixels every second pixel
is one of kW / 2 pairs (one more where it starts within a pair) at every pair: the kernel gets zeros for pixels of a
pair that are none of the window's. It is space-to-depth along rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np

CHANNELS = 4
"""Of a pixel, zeros included."""
TOGETHER = 2 * CHANNELS


def fits(channels: int, groups: int, width: int, strides: tuple[int, ...], dilations: tuple[int, ...]) -> bool:
    """Whether a convolution can be one of pairs."""
    return channels <= CHANNELS and groups == 1 and width % 2 == 0 and strides[1] == 2 and dilations[1] == 1


def paired(kernel: np.ndarray, geometry: dict[str, Any]) -> tuple[np.ndarray, dict[str, Any]]:
    """The kernel (M, C, kH, kW) -> (M, 8, kH, pairs), and the convolution's geometry in pairs."""
    outs, channels, k_h, k_w = kernel.shape
    height, width = geometry["size"]
    top, left, bottom, _ = geometry["pads"]
    shift = left % 2  # a window that starts at the second pixel of a pair
    pairs = -(-(k_w + shift) // 2)
    whole = np.zeros((outs, CHANNELS, k_h, 2 * pairs), kernel.dtype)
    whole[:, :channels, :, shift : shift + k_w] = kernel
    split = whole.reshape(outs, CHANNELS, k_h, pairs, 2).transpose(0, 4, 1, 2, 3)
    before, columns = (left + shift) // 2, geometry["out_size"][1]
    after = max(columns - 1 + pairs - width // 2 - before, 0)
    changed = {
        "size": (height, width // 2),
        "strides": (geometry["strides"][0], 1),
        "pads": (top, before, bottom, after),
    }
    return np.ascontiguousarray(split.reshape(outs, TOGETHER, k_h, pairs)), {**geometry, **changed}


def pair_pixels(data):
    """(N, C, H, W) -> (N, 1, H * W / 2, 8), zeros for channels that are not there."""
    from tvm import te, tirx

    batch, channels, height, width = (int(d) for d in data.shape)
    half = width // 2

    def cell(n, _, p, v):
        channel = v % CHANNELS
        column = p % half * 2 + v // CHANNELS
        zero = tirx.const(0, data.dtype)
        return tirx.if_then_else(channel < channels, data[n, channel, p // half, column], zero)

    return te.compute((batch, 1, height * half, TOGETHER), cell, name="pair_pixels")
