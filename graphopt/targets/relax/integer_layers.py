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
from graphopt.targets.relax.emitters import Node, output_size, pads_of
from graphopt.targets.relax.grouping import merge_groups
from graphopt.targets.relax.values import ELEMENTWISE, FUSABLE_ROOT, INJECTIVE, Builder, Encoded, Value, block_array

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


@dataclass(frozen=True)
class Weights:
    """int8 weights, and the scale of each output channel."""

    integers: np.ndarray
    scales: np.ndarray


def convolution(builder: Builder, node: Node, data: Value, weight: Value, bias: Value | None) -> Value | None:
    """A two-dimensional convolution of bytes; None where it is not one."""
    encoded = data.encoded
    if encoded is None or encoded.source.dtype != "uint8" or not data.is_image or not isinstance(weight, Integers):
        return None
    weights = weight.signed(0)
    if weights is None:
        return None
    assert data.shape is not None
    size, kernel = data.shape[2:], weights.integers.shape[2:]
    geometry = geometry_of(node, size, kernel)
    groups = int(node.get("group", 1))
    if groups == data.channels == weights.integers.shape[0] and groups > 1:
        if weights.integers[0].size > EXACT_TAPS:
            return None
        sums = _depthwise(builder, encoded, weights.integers, geometry)
        zero_point = 0  # taken away before multiplying
    else:
        sums = _dense(builder, encoded, weights.integers, groups, geometry)
        zero_point = encoded.zero_point
    shape = (data.shape[0], weights.integers.shape[0], *geometry["out_size"])
    factors = encoded.scale * weights.scales
    offsets = -zero_point * weights.integers.reshape(shape[1], -1).sum(axis=1, dtype=np.int64) * factors
    if bias is not None and bias.const is not None:
        offsets = offsets + bias.const.reshape(-1)
    return _rescaled(builder, Value(shape, "int32", blocked=sums, block=int(sums.ty.shape[3])), factors, offsets)


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
    encoded = data.encoded
    if encoded is None or encoded.source.dtype != "uint8" or not isinstance(weight, Integers) or not data.shape:
        return None
    if weight.integers.ndim != 2 or len(data.shape) < 2:
        return None
    weights = weight.signed(0 if transposed else 1)
    if weights is None:
        return None
    matrix = weights.integers if transposed else np.ascontiguousarray(weights.integers.T)
    if data.shape[-1] != matrix.shape[1] or (bias is not None and bias.size not in (1, len(matrix))):
        return None
    sums = row_sums(builder, builder.moved(encoded.source), data.shape, matrix)
    factors = encoded.scale * weights.scales
    offsets = -encoded.zero_point * matrix.sum(axis=1, dtype=np.int64) * factors
    if bias is not None:
        offsets = offsets + bias.reshape(-1)
    return as_rows(builder, _rescaled(builder, sums, factors, offsets), (*data.shape[:-1], len(matrix)))


def row_sums(builder: Builder, data: Any, shape: tuple[int, ...], matrix: np.ndarray) -> Value:
    """32-bit sums of uint8 data (..., K) times int8 (N, K), as a blocked value (1, N, 1, M) of M rows.

    The rows are the positions of a 1x1 convolution, whose one input block is a whole row.
    """
    columns, depth = matrix.shape
    rows = int(np.prod(shape[:-1]))
    whole = -(-depth // integer_computes.QUAD) * integer_computes.QUAD
    if whole != depth:
        data = builder.call(integer_computes.pad_rows, data, depth=whole, pattern=INJECTIVE)
    kernel = np.zeros((columns, whole, 1, 1), np.int8)
    kernel[:, :depth, 0, 0] = matrix
    packed = integer_computes.pack_weight(kernel, whole, builder.block_for(columns))
    sums = builder.call(
        integer_computes.conv2d,
        builder.reshape(data, (1, 1, rows, whole)),
        builder.constant(packed),
        size=(1, rows),
        strides=(1, 1),
        pads=(0, 0, 0, 0),
        dilations=(1, 1),
        groups=1,
        out_size=(1, rows),
        pairs=integer_computes.fits_pairs(packed),
        pattern=FUSABLE_ROOT,
    )
    return Value((1, columns, 1, rows), "int32", blocked=sums, block=int(sums.ty.shape[3]))


def as_rows(builder: Builder, done: Value, shape: tuple[int, ...]) -> Value:
    """A blocked value (1, N, 1, M) as the rows (..., N) of ONNX's layout."""
    assert done.shape is not None
    if done.shape[3] == 1:
        return Value(shape, done.dtype, plain=builder.reshape(builder.moved(done), shape))
    plain = builder.call(integer_computes.unblock_rows, done.blocked, shape=shape, pattern=INJECTIVE)
    return Value(shape, done.dtype, plain=plain)


def _rescaled(builder: Builder, sums: Value, factors: np.ndarray, offsets: np.ndarray) -> Value:
    """float32 of the sums: times a factor, plus an offset, one of each a channel."""
    along = [block_array(x.astype(np.float32).reshape(1, -1, 1, 1), sums.block) for x in (factors, offsets)]
    constants = [builder.constant(x) for x in along]
    done = builder.call(integer_computes.rescale, sums.blocked, *constants, pattern=ELEMENTWISE)
    return Value(sums.shape, "float32", blocked=done, block=sums.block)


def _depthwise(builder: Builder, encoded: Encoded, kernel: np.ndarray, geometry: dict[str, Any]):
    source = builder.blocked(encoded.source)
    channels, _, k_h, k_w = kernel.shape
    filters = block_array(kernel.astype(np.float32).reshape(1, channels, k_h, k_w), encoded.source.block)[0]
    shaped = filters.reshape(filters.shape[0], k_h, k_w, encoded.source.block)
    return builder.call(
        computes.depthwise,
        source,
        builder.constant(shaped),
        zero_point=encoded.zero_point,
        pattern=FUSABLE_ROOT,
        **geometry,
    )


def _dense(builder: Builder, encoded: Encoded, kernel: np.ndarray, groups: int, geometry: dict[str, Any]):
    frame = builder.constant(np.full(1, encoded.zero_point, np.uint8)) if encoded.zero_point else None
    return dense_sums(builder, encoded.source, kernel, groups, geometry, frame)


def dense_sums(builder: Builder, source: Value, kernel: np.ndarray, groups: int, geometry: dict[str, Any], frame: Any):
    """32-bit sums of a uint8 picture times an int8 kernel (M, C / groups, kH, kW), in blocked form.

    `frame` is a Relax tensor of one byte, which stands for zeros around the picture; None where that byte is 0.
    """
    data, lanes_in = builder.blocked(source), source.block
    size, pads = geometry["size"], geometry["pads"]
    if frame is not None and any(pads):
        data = builder.call(integer_computes.pad_cells, data, frame, size=size, pads=pads, pattern=INJECTIVE)
        framed = (size[0] + pads[0] + pads[2], size[1] + pads[1] + pads[3])
        geometry = {**geometry, "size": framed, "pads": (0, 0, 0, 0)}
    lanes_out = builder.block_for(kernel.shape[0])
    kernel, groups = merge_groups(kernel, groups, lanes_in, lanes_out)
    packed = integer_computes.pack_weight(kernel, lanes_in, lanes_out)
    return builder.call(
        integer_computes.conv2d,
        data,
        builder.constant(packed),
        groups=groups,
        pairs=integer_computes.fits_pairs(packed),
        pattern=FUSABLE_ROOT,
        **geometry,
    )
