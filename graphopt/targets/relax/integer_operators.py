"""MatMulInteger and ConvInteger: bytes times bytes whose zero point is known at run time only.

What dynamic quantization writes: DynamicQuantizeLinear finds scale and zero point of an activation in each run, and
the 32-bit sums that these operators return are scaled by operators of their own. The weights are constant, so the zero
point's part is one product with their sums.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from graphopt.targets.relax import computes, exact_bytes, integer_computes
from graphopt.targets.relax.emitters import Inputs, Node, emits
from graphopt.targets.relax.integer_layers import dense_sums, geometry_of, row_sums
from graphopt.targets.relax.rows import rows_of
from graphopt.targets.relax.values import ELEMENTWISE, Builder, Value, block_array


@emits("MatMulInteger")
def matmul_integer(builder: Builder, node: Node, inputs: Inputs) -> list[Value] | None:
    data, weight, data_zero, weight_zero = [*inputs, None, None][:4]
    if not _is_bytes(data, data_zero) or weight is None or weight.const is None or weight.const.ndim != 2:
        return None
    assert data is not None and data.shape is not None
    matrix = _signed(weight.const, weight_zero, 1)
    if matrix is None or len(data.shape) < 2:
        return None
    matrix = np.ascontiguousarray(matrix.T)
    source, zero = _multiplied(builder, data, data_zero)
    sums = row_sums(builder, source, data.shape, matrix, np.zeros(len(matrix), np.int32))
    return [rows_of(builder, _corrected(builder, sums, matrix, zero), (*data.shape[:-1], len(matrix)))]


@emits("ConvInteger")
def conv_integer(builder: Builder, node: Node, inputs: Inputs) -> list[Value] | None:
    data, weight, data_zero, weight_zero = [*inputs, None, None][:4]
    if not _is_bytes(data, data_zero) or weight is None:
        return None
    if weight.const is None or weight.const.ndim != 4:
        return exact_bytes.conv(builder, node, inputs)
    assert data is not None and data.shape is not None
    kernel = _signed(weight.const, weight_zero, 0)
    if kernel is None or not data.is_image:
        return exact_bytes.conv(builder, node, inputs)
    source, zero = _multiplied(builder, data, data_zero)
    geometry = geometry_of(node, data.shape[2:], kernel.shape[2:])
    start = np.zeros(len(kernel), np.int32)
    made = dense_sums(builder, source, kernel, start, int(node.get("group", 1)), geometry, zero)
    shape = (data.shape[0], len(kernel), *geometry["out_size"])
    return [_corrected(builder, Value(shape, "int32", blocked=made, block=int(made.ty.shape[3])), kernel, zero)]


@emits("QLinearMatMul")
def qlinear_matmul(builder: Builder, node: Node, inputs: Inputs) -> list[Value] | None:
    """What `qoperators` leaves: scales of fewer digits than float32, with which the product has to be exact."""
    return exact_bytes.matmul(builder, node, inputs)


def _is_bytes(data: Value | None, zero: Value | None) -> bool:
    if data is None or not data.shape or data.dtype not in computes.BYTES:
        return False
    return zero is None or (zero.shape is not None and int(np.prod(zero.shape)) == 1)


def _signed(integers: np.ndarray, zero: Value | None, axis: int) -> np.ndarray | None:
    """Constant weights less their zero point, which is one number or one for each index of `axis`; None where that
    does not fit int8."""
    difference = integers.astype(np.int32)
    if zero is not None:
        if zero.const is None:
            return None
        along = [1] * integers.ndim
        along[axis] = -1
        difference = difference - zero.const.astype(np.int32).reshape(along)
    if difference.size == 0 or difference.min() < -128 or difference.max() > 127:
        return None
    return difference.astype(np.int8)


def _multiplied(builder: Builder, data: Value, zero: Value | None) -> tuple[Value, Any]:
    """The bytes as the type that is multiplied, and their zero point as a Relax tensor of one byte."""
    point = builder.constant(np.zeros(1, np.dtype(data.dtype))) if zero is None else builder.plain(zero)
    if data.dtype == builder.byte_type:
        return data, point
    shifted = builder.call(integer_computes.shift, builder.plain(data), pattern=ELEMENTWISE)
    return Value(data.shape, builder.byte_type, plain=shifted), builder.call(
        integer_computes.shift, point, pattern=ELEMENTWISE
    )


def _corrected(builder: Builder, sums: Value, weights: np.ndarray, zero: Any) -> Value:
    """Sums of products of stored bytes, less the zero point's part."""
    totals = weights.reshape(len(weights), -1).sum(axis=1, dtype=np.int32).reshape(1, -1, 1, 1)
    along = builder.constant(block_array(totals, sums.block))
    done = builder.call(integer_computes.less_zero_point, sums.blocked, along, zero, pattern=ELEMENTWISE)
    return Value(sums.shape, "int32", blocked=done, block=sums.block)
