"""Matrix products with weights of 4 bits in blocks: half the bytes of int8, a scale for each block of inputs.

A row times such a matrix takes as long as the weights take to arrive, so they stay packed until they are in registers.
The activations are bytes (out of DequantizeLinear), multiplied with the nibbles by dot products, or float32.

Source: Frantar et al., GPTQ, ICLR 2023, section 4 (weights of 4 bits, decompressed in the product of one row).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from graphopt.targets.relax import integer_computes
from graphopt.targets.relax.rows import rows_of
from graphopt.targets.relax.values import FUSABLE_ROOT, Builder, Value

NAME = "matmul_int4"
BLOCK = "graphopt.block"
"""Annotation of `matmul_int4`: inputs of a block."""
ZERO = "graphopt.zero"
"""Annotation: the zero point of all weights; -1 where they differ."""
STEP = 8
"""Inputs that a 32-bit lane of packed weights holds."""
FEW_ROWS = 4
"""Rows up to which unpacking weights once a row is worth it."""


class Blocks(Value):
    """A float32 constant (K, N) that is (integers - zero_points) * scales, with one of these for each block of K."""

    def __init__(self, const: np.ndarray, integers: np.ndarray, scales: np.ndarray, zero_points: np.ndarray):
        super().__init__(tuple(const.shape), "float32", const=const)
        self.integers, self.scales, self.zero_points = integers, scales, zero_points
        """(K, N) from 0 to 15; (K / block, N); likewise, from 0 to 15."""

    @property
    def inputs(self) -> int:
        """Of a block."""
        return len(self.integers) // len(self.scales)


def blocks_of(const: np.ndarray, stored: np.ndarray, scale: np.ndarray, zero: np.ndarray | None, axis: int, size: int):
    """A dequantized constant as `Blocks`; None where it is not one of 4 bits in blocks along the first of two axes."""
    if stored.ndim != 2 or axis % 2 or size % STEP or stored.shape[0] != size * scale.shape[0]:
        return None
    lift = 8 if str(stored.dtype) in ("int4", "int8") else 0
    integers = stored.astype(np.int32) + lift
    zeros = np.zeros(scale.shape, np.int32) if zero is None else zero.astype(np.int32)
    zeros = zeros + lift
    if any(x.size == 0 or x.min() < 0 or x.max() > 15 for x in (integers, zeros)):
        return None
    return Blocks(const, integers.astype(np.uint8), scale, zeros.astype(np.uint8))


def product(builder: Builder, data: Value, weight: Value) -> Value | None:
    """(..., K) times `Blocks` (K, N), for a few rows; None where it is not that."""
    if not isinstance(weight, Blocks) or not data.shape or data.shape[-1] != len(weight.integers):
        return None
    rows = int(np.prod(data.shape[:-1]))
    if rows > FEW_ROWS or builder.narrows or not builder.lanes:
        return None
    encoded = data.encoded if data.encoded is not None and data.encoded.source.dtype == builder.byte_type else None
    source = builder.plain(data) if encoded is None else builder.moved(encoded.source)
    columns, lanes = weight.integers.shape[1], builder.lanes
    tiles = -(-columns // lanes)
    packed = pack(weight.integers, lanes).reshape(tiles, len(weight.scales), weight.inputs // STEP, lanes * 4)
    scales, points = (_by_tile(x, lanes) for x in (weight.scales.astype(np.float32), weight.zero_points))
    offset = np.zeros(tiles * lanes, np.float64)
    if encoded is not None:  # the zero point of the bytes, whose part does not depend on them
        scales = (scales.astype(np.float64) * encoded.scale).astype(np.float32)
        wide = np.repeat(weight.zero_points.astype(np.int64), weight.inputs, 0)
        sums = (weight.integers - wide).reshape(*weight.scales.shape[:1], weight.inputs, columns).sum(1)
        offset[:columns] = -encoded.zero_point * (sums * weight.scales.astype(np.float64) * encoded.scale).sum(0)
    zero = int(weight.zero_points.flat[0])
    made = builder.call(
        matmul,
        builder.reshape(source, (rows, data.shape[-1])),
        builder.constant(packed),
        builder.constant(scales),
        builder.constant(points),
        builder.constant(offset.astype(np.float32).reshape(tiles, lanes)),
        zero=zero if np.all(weight.zero_points == zero) else -1,
        pattern=FUSABLE_ROOT,
        name=NAME,
    )
    done = Value((1, columns, 1, rows), "float32", blocked=made, block=lanes)
    return rows_of(builder, done, (*data.shape[:-1], columns))


def matmul(data, weight, scales, points, offset, *, zero: int):
    """data (M, K) uint8 or float32; weight (N / b, blocks, inputs / 8, b * 4) uint8; scales and points
    (N / b, blocks, b); offset (N / b, b) -> (1, N / b, M, b) float32.

    Of the 4 bytes of a lane the low halves are inputs 8 j to 8 j + 3, the high ones the next four.
    """
    from tvm import te

    rows = int(data.shape[0])
    tiles, blocks, steps, wide = (int(d) for d in weight.shape)
    lanes = wide // integer_computes.QUAD
    b: Any = te.reduce_axis((0, blocks), "b")
    j = te.reduce_axis((0, steps), "j")
    k: Any = te.reduce_axis((0, STEP), "k")

    def cell(one, o, m, v):
        byte: Any = weight[o, b, j, v * 4 + k % 4].astype("int32")
        nibble = (byte >> (k // 4 * 4)) & 15
        number = (nibble - points[o, b, v].astype("int32")).astype("float32")
        return te.sum(data[m, (b * steps + j) * STEP + k].astype("float32") * number * scales[o, b, v], axis=[b, j, k])

    sums: Any = te.compute((1, tiles, rows, lanes), cell, name=NAME, attrs={BLOCK: steps * STEP, ZERO: zero})
    return te.compute(sums.shape, lambda one, o, m, v: sums[one, o, m, v] + offset[o, v], name="offset")


def pack(integers: np.ndarray, lanes: int) -> np.ndarray:
    """(K, N) from 0 to 15 -> (N / lanes, K / 8, lanes * 4): see `matmul`."""
    depth, columns = integers.shape
    tiles = -(-columns // lanes)
    padded = np.zeros((depth, tiles * lanes), np.uint8)
    padded[:, :columns] = integers
    halves = padded.reshape(depth // STEP, 2, 4, tiles, lanes)
    joined = halves[:, 0] | halves[:, 1] << 4
    return np.ascontiguousarray(joined.transpose(2, 0, 3, 1)).reshape(tiles, depth // STEP, lanes * 4)


def _by_tile(array: np.ndarray, lanes: int) -> np.ndarray:
    """(blocks, N) -> (N / lanes, blocks, lanes), zeros for padded columns."""
    blocks, columns = array.shape
    padded = np.zeros((blocks, -(-columns // lanes) * lanes), array.dtype)
    padded[:, :columns] = array
    return np.ascontiguousarray(padded.reshape(blocks, -1, lanes).transpose(1, 0, 2))
