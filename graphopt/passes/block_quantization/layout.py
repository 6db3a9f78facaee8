"""Where the blocks of a layer's weights lie, and how ONNX's DequantizeLinear says so.

DequantizeLinear with `axis` and `block_size` gives every `block_size` consecutive weights along one axis a scale; the
last block may be shorter. Cases:

1. A row has no more taps than a block: one scale a row, as DequantizeLinear without `block_size` along the channels.
2. Gemm, MatMul: blocks along K, of the matrix as it is stored. (`write` turns that of a Gemm with transB around.)
3. Conv whose weights (M, C/group, kH, kW) can be blocked along C/group with at most a quarter more scales than along
   the whole row: axis 1, every place of the kernel by itself. (Always so for 1x1, and where C/group is a multiple.)
4. Other Conv: stored as a matrix (M, C/group kH kW) with blocks along axis 1; a Reshape follows DequantizeLinear.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from graphopt.passes.weight_layers import WeightLayer

WASTE = 1.25
"""Most scales, over those of blocks along the whole row, for which no Reshape is needed."""


@dataclass(frozen=True)
class Layout:
    """Of one layer's weights."""

    block_of: np.ndarray
    """int (taps,): the block of every tap; blocks count from 0 along a row."""
    size: int
    """`block_size`; 0 in case 1."""
    stored: tuple[int, ...]
    """Shape of the stored integers."""
    scales: tuple[int, ...]
    """Shape of the stored scales and zero points."""
    axis: int
    channel_axis: int
    """The axis of the stored integers and scales that counts rows."""

    @property
    def blocks(self) -> int:
        """Of a row."""
        return int(self.block_of.max()) + 1

    def integers(self, rows: np.ndarray) -> np.ndarray:
        """`rows` (groups, rows, taps) in the shape they are stored in."""
        return self._arranged(rows, self.stored)

    def by_block(self, rows: np.ndarray) -> np.ndarray:
        """`rows` (groups, rows, blocks) in the shape scales are stored in."""
        return self._arranged(rows, self.scales) if self.size else np.ascontiguousarray(rows.reshape(self.scales))

    def _arranged(self, rows: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        first = (shape[self.channel_axis], *(d for a, d in enumerate(shape) if a != self.channel_axis))
        return np.ascontiguousarray(np.moveaxis(rows.reshape(first), 0, self.channel_axis))


def layout(each: WeightLayer, size: int) -> Layout:
    """The layout of a layer's weights in blocks of `size`; 0: one scale a row."""
    shape, axis = each.weights.shape, each.layer.channel_axis
    channels, taps = shape[axis], each.taps
    if size == 0 or taps <= size:
        return Layout(np.zeros(taps, int), 0, shape, (channels,), axis, axis)
    along = np.arange(taps) // size
    flat = -(-taps // size)
    if each.node.op_type != "Conv":
        scales = (flat, channels) if axis == 1 else (channels, flat)
        return Layout(along, size, shape, scales, 1 - axis, axis)
    inputs, places = shape[1], math.prod(shape[2:])
    deep = -(-inputs // size)
    if deep * places <= WASTE * flat:
        channel, place = np.divmod(np.arange(taps), places)
        return Layout(channel // size * places + place, size, shape, (channels, deep, *shape[2:]), 1, 0)
    return Layout(along, size, (channels, taps), (channels, flat), 1, 0)
