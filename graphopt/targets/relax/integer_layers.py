"""Layers that multiply bytes: their input comes out of DequantizeLinear, and so do their weights.

A layer of quantized x and w is scale_x * scale_w[m] * (sum(x_q * w_q) - zero_x * sum(w_q)) + bias[m]: 32-bit sums of
what is stored, then one multiplication and addition in float32 for each output, which the activation, a residual Add
and the QuantizeLinear behind it join. Weights, factors and offsets are made here, once. Zeros around a picture are
bytes `zero_x`, so a picture whose zero point is not 0 is copied into a frame of them first.

Depthwise convolutions have no sums over channels for a dot product to add: they multiply the bytes as float32, exactly.

Source: Jacob et al., Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference,
CVPR 2018, section 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from graphopt.targets.relax import computes, integer_computes
from graphopt.targets.relax.borders import borders
from graphopt.targets.relax.emitters import Node, output_size, pads_of
from graphopt.targets.relax.grouping import merge_groups
from graphopt.targets.relax.rows import Rows, rows_of
from graphopt.targets.relax.values import (
    ELEMENTWISE,
    FUSABLE_ROOT,
    INJECTIVE,
    OPAQUE,
    Builder,
    Encoded,
    Origin,
    Sums,
    Value,
    block_array,
)

TILE_ROWS = 16
"""Rows of a tile: fewer of them are too few for it."""
EXACT_TAPS = 500
"""Products of a byte and an 8-bit weight that float32 adds up without rounding: 2^24 / 255 / 128 of them."""


class Integers(Value):
    """A float32 constant that is (integers - zero_point) * scale, with one scale or one for each index of `axis`."""

    def __init__(self, const: np.ndarray, integers: np.ndarray, scale: np.ndarray, zero_point: np.ndarray, axis: int):
        super().__init__(tuple(const.shape), "float32", const=const)
        self.integers, self.scale, self.zero_point, self.axis = integers, scale, zero_point, axis

    def signed(self, axis: int) -> Weights | None:
        """The constant as int8 with scales along `axis`; None where that would not be exact."""
        several = max(self.scale.size, self.zero_point.size) > 1
        if self.integers.dtype not in (np.int8, np.uint8) or (several and self.axis % self.integers.ndim != axis):
            return None
        along = [1] * self.integers.ndim
        along[axis] = -1
        difference = self.integers.astype(np.int32) - self.zero_point.astype(np.int32).reshape(along)
        if difference.size == 0 or difference.min() < -128 or difference.max() > 127:
            return None
        scales = np.broadcast_to(self.scale.reshape(-1), (self.integers.shape[axis],))
        return Weights(difference.astype(np.int8), scales.astype(np.float64))


def lifted(weight: Value) -> Value:
    """The weights of a one-dimensional convolution with a height of 1."""
    if not isinstance(weight, Integers) or weight.const is None:
        return weight
    const, integers = weight.const[:, :, None], weight.integers[:, :, None]
    return Integers(const, integers, weight.scale, weight.zero_point, weight.axis)


@dataclass(frozen=True)
class Weights:
    """int8 weights, and the scale of each output channel."""

    integers: np.ndarray
    """Output channels first."""
    scales: np.ndarray

    @property
    def fit(self) -> bool:
        """Whether sums of products with bytes stay within 32 bits."""
        rows = self.integers.reshape(len(self.integers), -1)
        return 255 * int(np.abs(rows.astype(np.int64)).sum(axis=1).max(initial=0)) < INTEGER_SUMS


def convolution(builder: Builder, node: Node, data: Value, weight: Value, bias: Value | None) -> Value | None:
    """A two-dimensional convolution of bytes; None where it is not one."""
    if data.encoded is None or not _is_bytes(data.encoded) or not data.is_image or not isinstance(weight, Integers):
        return None
    weights = weight.signed(0)
    if weights is None or not weights.fit:
        return None
    return dense_or_depthwise(builder, node, data, weights, bias)


def dense_or_depthwise(builder: Builder, node: Node, data: Value, weights: Weights, bias: Value | None) -> Value | None:
    """A convolution of an encoded picture with the attributes of `node` and weights (M, C / groups, kH, kW)."""
    assert data.shape is not None and data.encoded is not None
    encoded = _multiplied(builder, data.encoded)
    geometry = geometry_of(node, data.shape[2:], weights.integers.shape[2:])
    groups = int(node.get("group", 1))
    if groups == data.channels == weights.integers.shape[0] and groups > 1:
        if builder.byte_type == "int8":
            plan = _planned(encoded.scale, encoded.zero_point, weights, bias, INTEGER_SUMS)
            sums = _depthwise_sums(builder, encoded, weights.integers, plan.start, geometry)
            return plan.result((data.shape[0], data.channels, *geometry["out_size"]), sums)
        if weights.integers[0].size > EXACT_TAPS:
            return None
        plan = _planned(encoded.scale, 0, weights, bias, FLOAT_SUMS)
        sums = _depthwise(builder, encoded, weights.integers, plan.start, geometry)
    else:
        plan = _planned(encoded.scale, encoded.zero_point, weights, bias, INTEGER_SUMS)
        start, frame = plan.start, None
        if encoded.zero_point and builder.byte_type == "int8":
            start = _border_starts(start, weights.integers, encoded.zero_point, geometry)
        elif encoded.zero_point:
            frame = builder.constant(np.full(1, encoded.zero_point, np.uint8))
        sums = dense_sums(builder, encoded.source, weights.integers, start, groups, geometry, frame)
    shape = (data.shape[0], weights.integers.shape[0], *geometry["out_size"])
    return plan.result(shape, sums)


def _is_bytes(encoded: Encoded) -> bool:
    return encoded.source.dtype in computes.BYTES


def _multiplied(builder: Builder, encoded: Encoded) -> Encoded:
    """The same numbers as bytes of the type that dot products multiply."""
    if encoded.source.dtype == builder.byte_type:
        return encoded
    source, dtype = encoded.source, builder.byte_type
    if source.blocked is None:
        plain = builder.call(integer_computes.shift, builder.plain(source), pattern=ELEMENTWISE)
        shifted = Value(source.shape, dtype, plain=plain)
    else:
        blocked = builder.call(integer_computes.shift, source.blocked, pattern=ELEMENTWISE)
        shifted = Value(source.shape, dtype, blocked=blocked, block=source.block)
    return Encoded(shifted, encoded.scale, encoded.zero_point + (128 if dtype == "uint8" else -128))


def transposed_weights(data: Value, weight: Value, groups: int) -> Weights | None:
    """The int8 weights (C, M / groups, kH, kW) of a transposed convolution of bytes, and a scale for each of the M
    outputs; None where it is not one."""
    if data.encoded is None or not _is_bytes(data.encoded) or not isinstance(weight, Integers):
        return None
    weights = weight.signed(1)
    if weights is None or (groups > 1 and weight.scale.size > 1):
        return None
    return Weights(weights.integers, np.tile(weights.scales, groups))


@dataclass(frozen=True)
class _Plan:
    """How a layer's sums become its result."""

    factors: np.ndarray
    start: np.ndarray
    """int32, one a channel: what sums start from."""
    offsets: np.ndarray
    """What `start` leaves of the bias and the zero point's part."""
    largest: np.ndarray

    def result(self, shape: tuple[int, ...], sums: Any) -> Value:
        found = Sums(sums, self.factors, self.offsets, self.largest)
        return Value(shape, "float32", sums=found, block=int(sums.ty.shape[3]))


def _border_starts(start: np.ndarray, kernel: np.ndarray, zero_point: int, geometry: dict[str, Any]) -> np.ndarray:
    """int32 (M, classes): what the sums of each class of outputs start from, where the taps outside are skipped."""
    down, across = borders(kernel=kernel.shape[2:], **{**geometry, "pads": geometry["pads"][:2]})
    taps = kernel.astype(np.int64).sum(axis=1)
    seen = np.einsum("mij,ri,cj->mrc", taps, down.seen().astype(np.int64), across.seen().astype(np.int64))
    missed = taps.sum(axis=(1, 2))[:, None, None] - seen
    return (start[:, None] + zero_point * missed.reshape(len(kernel), -1)).astype(np.int32)


FLOAT_SUMS, INTEGER_SUMS = 1 << 24, 1 << 31
"""Sums below this are exact: in float32, in int32."""


def _planned(scale: float, zero_point: int, weights: Weights, bias: Value | np.ndarray | None, limit: int) -> _Plan:
    """For data of this scale; `zero_point` is 0 where it was taken away before multiplying. Sums stay below `limit`."""
    rows = weights.integers.reshape(len(weights.integers), -1).astype(np.int64)
    factors = scale * weights.scales
    offsets = np.zeros(len(rows))
    constant = bias.const if isinstance(bias, Value) else bias
    if constant is not None:
        offsets = offsets + constant.reshape(-1).astype(np.float64)
    largest = 255.0 * np.abs(rows).sum(axis=1)
    offsets = offsets - zero_point * rows.sum(axis=1) * factors
    whole = np.rint(offsets / np.where(factors > 0, factors, 1.0))
    fits = (factors > 0) & (np.abs(whole) + largest < limit)
    start = np.where(fits, whole, 0).astype(np.int64)
    return _Plan(factors, start.astype(np.int32), offsets - start * factors, largest + np.abs(start))


LEAST_OFFSET = 1 / 256
"""Of a quantum: what is left of a bias in integers is forgotten when a result is quantized and this is smaller."""
MOST_QUANTA = 1 << 30
"""Numbers up to this, and zero points, fit 32 bits when they are rounded."""


def requantized(builder: Builder, value: Value, scale: float, zero_point: int, dtype: str) -> Value | None:
    """A layer's result as bytes, straight from its sums; None where its sums may be too large for that."""
    result = value.sums
    assert result is not None
    factors = quanta(result.factors, result.divisor, scale)
    offsets = result.offsets / np.float32(scale)
    if (result.largest * factors + np.abs(offsets)).max(initial=0.0) >= MOST_QUANTA:
        return None
    bounds = bounds_of(result.low, result.high, scale, zero_point, dtype)
    arrays = [factors] if np.abs(offsets).max(initial=0.0) < LEAST_OFFSET else [factors, offsets]
    along = [block_array(x.astype(np.float32).reshape(1, -1, 1, 1), value.block) for x in arrays]
    done = builder.call(
        integer_computes.requantize,
        result.sums,
        *(builder.constant(x) for x in along),
        scheme=(zero_point, *bounds),
        dtype=dtype,
        pattern=ELEMENTWISE,
    )
    return Value(value.shape, dtype, blocked=done, block=value.block)


def geometry_of(node: Node, size: tuple[int, ...], kernel: tuple[int, ...]) -> dict[str, Any]:
    """What a convolution's tensor expression wants to know of its window."""
    strides, dilations = tuple(node.get("strides", (1, 1))), tuple(node.get("dilations", (1, 1)))
    pads = pads_of(node, size, kernel, strides, dilations)
    out = output_size(size, kernel, strides, dilations, pads)
    return {"size": size, "strides": strides, "pads": pads, "dilations": dilations, "out_size": out}


def product(
    builder: Builder, data: Value, weight: Value, bias: np.ndarray | None, transposed: bool = False
) -> Value | None:
    """bytes (..., K) times int8 (K, N), or (N, K) where `transposed`, plus a constant of one number a column.

    None where it is not one.
    """
    if data.encoded is None or not _is_bytes(data.encoded) or not isinstance(weight, Integers) or not data.shape:
        return None
    if weight.integers.ndim != 2 or len(data.shape) < 2:
        return None
    weights = weight.signed(0 if transposed else 1)
    if weights is None:
        return None
    matrix = weights.integers if transposed else np.ascontiguousarray(weights.integers.T)
    if not Weights(matrix, weights.scales).fit:
        return None
    if data.shape[-1] != matrix.shape[1] or (bias is not None and bias.size not in (1, len(matrix))):
        return None
    encoded = _multiplied(builder, data.encoded)
    plan = _planned(encoded.scale, encoded.zero_point, Weights(matrix, weights.scales), bias, INTEGER_SUMS)
    sums = row_sums(builder, encoded.source, data.shape, matrix, plan.start)
    assert sums.shape is not None
    return rows_of(builder, plan.result(sums.shape, sums.blocked), (*data.shape[:-1], len(matrix)))


def row_sums(builder: Builder, source: Value, shape: tuple[int, ...], matrix: np.ndarray, start: np.ndarray) -> Value:
    """`start` plus 32-bit sums of bytes (..., K) times int8 (N, K), as a blocked value (1, N, 1, M) of M rows.

    The rows are the positions of a 1x1 convolution. Where they are not in blocks its one input block is a whole row,
    which vectors read where it lies; tiles want blocks of their own size.
    """
    columns, depth = matrix.shape
    rows = int(np.prod(shape[:-1]))
    whole = isinstance(source, Rows) and source.in_blocks
    data = builder.blocked(source.image) if isinstance(source, Rows) and whole else builder.moved(source)
    if whole:
        block = int(data.ty.shape[3])
    elif builder.tiles and rows >= TILE_ROWS and depth > builder.block_for(depth) // 2:
        block = builder.block_for(depth)
        data = builder.call(integer_computes.block_rows, data, block=block, pattern=INJECTIVE)
    else:
        block = -(-depth // integer_computes.QUAD) * integer_computes.QUAD
        if block != depth:
            data = builder.call(integer_computes.pad_rows, data, depth=block, pattern=INJECTIVE)
        data = builder.reshape(data, (1, 1, rows, block))
    packed = integer_computes.pack_weight(matrix[:, :, None, None], block, builder.block_for(columns))
    sums = builder.call(
        integer_computes.conv2d,
        data,
        builder.constant(packed),
        _along_channels(builder, start, packed),
        size=(1, rows),
        strides=(1, 1),
        pads=(0, 0, 0, 0),
        dilations=(1, 1),
        groups=1,
        out_size=(1, rows),
        pairs=integer_computes.fits_pairs(packed, builder.byte_type),
        pattern=FUSABLE_ROOT,
    )
    return Value((1, columns, 1, rows), "int32", blocked=sums, block=int(sums.ty.shape[3]))


def joint_bytes(builder: Builder, value: Value, scale: float, zero_point: int, dtype: str) -> Value | None:
    """The sum or product of two dequantized values as bytes; None where numbers may be too large for that."""
    joint = value.joint
    assert joint is not None
    a, b = joint.a, joint.b
    bounds = bounds_of(joint.low, joint.high, scale, zero_point, dtype)
    step, first, second = np.float32(scale), np.float32(a.scale), np.float32(b.scale)
    if joint.operation == "add":
        factors = first / step, second / step
        offset = np.float32(zero_point) - (
            factors[0] * np.float32(a.zero_point) + factors[1] * np.float32(b.zero_point)
        )
        if 255 * float(sum(factors)) + abs(float(offset)) >= MOST_QUANTA:
            return None
        done = builder.call(
            integer_computes.add_bytes,
            *joint.stored,
            factors=(float(factors[0]), float(factors[1])),
            offset=float(offset),
            bounds=bounds,
            dtype=dtype,
            pattern=_pattern(*joint.stored),
        )
    else:
        factor = first * second / step
        if 255.0 * 255.0 * float(factor) >= MOST_QUANTA:
            return None
        done = builder.call(
            integer_computes.multiply_bytes,
            *joint.stored,
            zero_points=(a.zero_point, b.zero_point),
            factor=float(factor),
            scheme=(zero_point, *bounds),
            dtype=dtype,
            pattern=_pattern(*joint.stored),
        )
    return Value(value.shape, dtype, blocked=done, block=value.block)


def _pattern(*operands: Any) -> int:
    """How a kernel of these operands fuses: computed once, not once for each element it broadcasts to."""
    shapes = {tuple(int(d) for d in each.ty.shape.values) for each in operands}
    return ELEMENTWISE if len(shapes) == 1 else INJECTIVE


def spatial_sum(builder: Builder, data: Value, encoded: Encoded, mean: bool) -> Value:
    """Sum or mean over H * W of dequantized bytes."""
    assert data.shape is not None
    area = data.shape[2] * data.shape[3]
    sums = builder.call(
        computes.spatial_sum,
        builder.blocked(encoded.source),
        mean=False,
        zero_point=encoded.zero_point,
        pattern=FUSABLE_ROOT,
    )
    channels = data.shape[1]
    found = Sums(
        sums, np.full(channels, encoded.scale), np.zeros(channels), np.full(channels, 255.0 * area),
        float(area) if mean else 1.0,
    )  # fmt: skip
    return Value((*data.shape[:2], 1, 1), "float32", sums=found, block=encoded.source.block)


def quanta(factors: np.ndarray, divisor: float, scale: float) -> np.ndarray:
    """float32: what a sum counts in quanta of `scale`, in the order of operations that ONNX Runtime has."""
    return factors.astype(np.float32) / np.float32(np.float32(scale) * np.float32(divisor))


def bounds_of(low: float, high: float, scale: float, zero_point: int, dtype: str) -> tuple[int, int]:
    """The least and the largest byte of numbers clipped to [low, high]: quantizing is monotonic."""
    info = np.iinfo(dtype)
    found = []
    for bound, saturated in ((low, info.min), (high, info.max)):
        level = saturated if np.isinf(bound) else int(np.rint(np.float32(bound) / np.float32(scale))) + zero_point
        found.append(int(min(max(level, info.min), info.max)))
    return found[0], found[1]


def _depthwise(builder: Builder, encoded: Encoded, kernel: np.ndarray, start: np.ndarray, geometry: dict[str, Any]):
    source = builder.blocked(encoded.source)
    channels, _, k_h, k_w = kernel.shape
    filters = block_array(kernel.astype(np.float32).reshape(1, channels, k_h, k_w), encoded.source.block)[0]
    shaped = filters.reshape(filters.shape[0], k_h, k_w, encoded.source.block)
    sums = builder.call(
        computes.depthwise,
        source,
        builder.constant(shaped),
        zero_point=encoded.zero_point,
        pattern=FUSABLE_ROOT,
        **geometry,
    )
    if not np.any(start):
        return sums
    first = builder.constant(block_array(start.astype(np.float32).reshape(1, -1, 1, 1), encoded.source.block))
    return builder.call(integer_computes.start_from, sums, first, pattern=ELEMENTWISE)


def _depthwise_sums(
    builder: Builder, encoded: Encoded, kernel: np.ndarray, start: np.ndarray, geometry: dict[str, Any]
) -> Any:
    """The same in integers: `start` plus 32-bit sums of int8 products."""
    source = builder.blocked(encoded.source)
    channels, _, k_h, k_w = kernel.shape
    block = encoded.source.block
    filters = block_array(kernel.reshape(1, channels, k_h, k_w), block)[0]
    if encoded.zero_point:
        start = _border_starts(start, kernel, encoded.zero_point, geometry)
    return builder.call(
        integer_computes.depthwise,
        source,
        builder.constant(filters.reshape(filters.shape[0], k_h, k_w, block)),
        builder.constant(_in_blocks(start, filters.shape[0], block)),
        pairs=int(kernel.min(initial=0)) > -128,
        pattern=FUSABLE_ROOT,
        **geometry,
    )


def dense_sums(
    builder: Builder,
    source: Value,
    kernel: np.ndarray,
    start: np.ndarray,
    groups: int,
    geometry: dict[str, Any],
    frame: Any,
) -> Any:
    """`start` plus 32-bit sums of a picture of bytes times an int8 kernel (M, C / groups, kH, kW), in blocked form.

    `start` is (M,), or (M, classes) with one for each class of outputs at the border (see `borders`).
    `frame` is a Relax tensor of one byte, which stands for zeros around the picture; None where that byte is 0.
    """
    size, pads = geometry["size"], geometry["pads"]
    framed = frame is not None and any(pads)
    if source.origin is not None and source.blocked is None:
        data, lanes_in = _pixels(builder, source.origin, pads if framed else (0, 0, 0, 0)), integer_computes.QUAD
    else:
        data, lanes_in = builder.blocked(source), source.block
        if framed:
            data = builder.call(integer_computes.pad_cells, data, frame, size=size, pads=pads, pattern=INJECTIVE)
    if framed:
        whole = (size[0] + pads[0] + pads[2], size[1] + pads[1] + pads[3])
        geometry = {**geometry, "size": whole, "pads": (0, 0, 0, 0)}
    lanes_out = builder.block_for(kernel.shape[0])
    kernel, groups = merge_groups(kernel, groups, lanes_in, lanes_out)
    packed = integer_computes.pack_weight(kernel, lanes_in, lanes_out)
    return builder.call(
        integer_computes.conv2d,
        data,
        builder.constant(packed),
        _along_channels(builder, start, packed),
        groups=groups,
        pairs=integer_computes.fits_pairs(packed, builder.byte_type),
        pattern=FUSABLE_ROOT,
        **geometry,
    )


def _pixels(builder: Builder, origin: Origin, pads: tuple[int, int, int, int]) -> Any:
    """A picture of at most four channels quantized, blocked and framed in one pass."""
    return builder.call(
        integer_computes.pixels,
        origin.expression,
        scale=origin.scale,
        zero_point=origin.zero_point,
        pads=pads,
        dtype=builder.byte_type,
        pattern=OPAQUE,
    )


def _along_channels(builder: Builder, numbers: np.ndarray, packed: np.ndarray) -> Any:
    """One int32, or as many as there are columns, for each output of packed weights: (1, M / ocb, columns, ocb)."""
    return builder.constant(_in_blocks(numbers, len(packed), packed.shape[-1] // integer_computes.QUAD))


def _in_blocks(numbers: np.ndarray, blocks: int, lanes: int) -> np.ndarray:
    """int32 (M,) or (M, columns) -> (1, blocks, columns, lanes), zeros where padded."""
    numbers = numbers.reshape(len(numbers), -1)
    padded = np.zeros((blocks * lanes, numbers.shape[1]), np.int32)
    padded[: len(numbers)] = numbers
    return np.ascontiguousarray(padded.reshape(1, blocks, lanes, -1).swapaxes(2, 3))
