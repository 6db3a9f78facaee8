"""Quantized operators in any form, one element of the definition after the other: QuantizeLinear and DequantizeLinear
with a scale a block, QLinearMatMul and ConvInteger whose weights are known at run time only.

    DequantizeLinear   (x - zero) scale
    QuantizeLinear     round(x / scale) + zero, saturated; ties to even
    QLinearMatMul      round(sum of (a - az)(b - bz) times as bs / ys) + yz, saturated
    ConvInteger        sum of (x - xz)(w - wz); padding counts as zero

Sums are 32-bit. These are plain loops: the forms that quantizers write for weights they know are in `integer_layers`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

from graphopt.targets.relax.emitters import Inputs, Node
from graphopt.targets.relax.values import ELEMENTWISE, OPAQUE, Builder, Value

_STORED = ("int8", "uint8", "int16", "uint16")


def blocked(builder: Builder, node: Node, inputs: Inputs) -> list[Value] | None:
    """QuantizeLinear or DequantizeLinear with `block_size`."""
    data, scale, zero = [*inputs, None][:3]
    if data is None or not data.shape or scale is None or scale.dtype != "float32":
        return None
    quantizes = node.op_type == "QuantizeLinear"
    dtype = "float32"
    if quantizes:
        number = int(node.get("output_dtype", 0))
        dtype = str(np.dtype(onnx.helper.tensor_dtype_to_np_dtype(number))) if number else "uint8"
        dtype = dtype if zero is None else zero.dtype
    if (dtype if quantizes else data.dtype) not in (*_STORED, *(() if quantizes else ("int32",))):
        return None
    if quantizes and data.dtype != "float32":
        return None
    made = builder.call(
        _of_blocks,
        builder.plain(data),
        builder.plain(scale),
        *([] if zero is None else [builder.plain(zero)]),
        axis=int(node.get("axis", 1)) % len(data.shape),
        block=int(node.get("block_size", 0)),
        stored=dtype if quantizes else "",
        pattern=OPAQUE,
        name="quantize_blocks" if quantizes else "dequantize_blocks",
    )
    return [Value(data.shape, dtype, plain=made)]


def _of_blocks(data: Any, scale: Any, zero: Any = None, *, axis: int, block: int, stored: str) -> Any:
    from tvm import te, tirx

    def element(*i: Any) -> Any:
        at = (*i[:axis], tirx.floordiv(i[axis], block), *i[axis + 1 :])
        offset = tirx.const(0, "int32") if zero is None else zero(*at).astype("int32")
        if not stored:
            return (data(*i).astype("int32") - offset).astype("float32") * scale(*at)
        return _saturated(_rounded(data(*i) / scale(*at)) + offset.astype("float32"), stored)

    return te.compute(data.shape, element, name="blocks")


def matmul(builder: Builder, node: Node, inputs: Inputs) -> list[Value] | None:
    """QLinearMatMul with one scale and zero point for each operand; scales of any float type are used as float32."""
    from tvm import relax

    if len(inputs) != 8 or any(v is None or v.shape is None for v in inputs):
        return None
    a, a_scale, a_zero, b, b_scale, b_zero, y_scale, y_zero = (v for v in inputs if v is not None)
    if any(int(np.prod(v.shape or ())) != 1 for v in (a_scale, a_zero, b_scale, b_zero, y_scale, y_zero)):
        return None
    if any(v.dtype not in ("int8", "uint8") for v in (a, b, y_zero)):
        return None
    sums = relax.op.matmul(_less(builder, a, a_zero), _less(builder, b, b_zero), out_dtype="int32")
    operands = [builder.reshape(builder.plain(v), (1,)) for v in (a_scale, b_scale, y_scale, y_zero)]
    made = builder.call(
        _stored, builder.emit(sums), *operands, dtype=y_zero.dtype, pattern=ELEMENTWISE, name="requantize"
    )
    shape = tuple(int(n) for n in made.ty.shape.values)
    return [Value(shape, y_zero.dtype, plain=made)]


def _stored(sums: Any, a_scale: Any, b_scale: Any, y_scale: Any, y_zero: Any, *, dtype: str) -> Any:
    from tvm import te

    def element(*i: Any) -> Any:
        a, b, y = (scale(0).astype("float32") for scale in (a_scale, b_scale, y_scale))
        return _saturated(_rounded(sums(*i).astype("float32") * (a * b / y)) + y_zero(0).astype("float32"), dtype)

    return te.compute(sums.shape, element, name="requantize")


def conv(builder: Builder, node: Node, inputs: Inputs) -> list[Value] | None:
    """ConvInteger of pictures."""
    data, weight, data_zero, weight_zero = [*inputs, None, None][:4]
    if data is None or weight is None or not data.is_image or not weight.is_image:
        return None
    assert data.shape is not None and weight.shape is not None
    from graphopt.targets.relax.integer_layers import geometry_of

    geometry = geometry_of(node, data.shape[2:], weight.shape[2:])
    column = None if weight_zero is None else (-1, 1, 1, 1)
    made = builder.call(
        _sums,
        _less(builder, data, data_zero),
        _less(builder, weight, weight_zero, column),
        out=tuple(geometry["out_size"]),
        strides=tuple(geometry["strides"]),
        dilations=tuple(geometry["dilations"]),
        before=tuple(geometry["pads"][:2]),
        groups=int(node.get("group", 1)),
        pattern=OPAQUE,
        name="conv_integer",
    )
    return [Value((data.shape[0], weight.shape[0], *geometry["out_size"]), "int32", plain=made)]


def _sums(data: Any, weight: Any, *, out, strides, dilations, before, groups: int) -> Any:
    from tvm import te, tirx

    size, outs, ins = [int(n) for n in data.shape[2:]], int(weight.shape[0]) // groups, int(weight.shape[1])
    channel, *taps = (te.reduce_axis((0, n), name) for n, name in zip(weight.shape[1:], ("c", "kh", "kw"), strict=True))

    def element(n: Any, m: Any, *y: Any) -> Any:
        at = [y[a] * strides[a] - before[a] + taps[a] * dilations[a] for a in range(2)]
        inside = tirx.all(at[0] >= 0, at[0] < size[0], at[1] >= 0, at[1] < size[1])
        source = data(n, tirx.floordiv(m, outs) * ins + channel, *at)
        value = tirx.if_then_else(inside, source, tirx.const(0, "int32"))
        return te.sum(value * weight(m, channel, *taps), axis=[channel, *taps])

    return te.compute((data.shape[0], weight.shape[0], *out), element, name="conv_integer")


def _less(builder: Builder, value: Value, zero: Value | None, column: tuple[int, ...] | None = None) -> Any:
    """int32 of bytes less their zero point: one number, or one for each of `column`'s -1."""
    from tvm import relax

    wide = builder.emit(relax.op.astype(builder.plain(value), "int32"))
    if zero is None:
        return wide
    count = int(np.prod(zero.shape or ()))
    shape = (1,) if column is None or count == 1 else tuple(count if n == -1 else n for n in column)
    point = builder.reshape(builder.plain(zero), shape)
    return builder.emit(relax.op.subtract(wide, builder.emit(relax.op.astype(point, "int32"))))


def _rounded(x: Any) -> Any:
    """The nearest whole number, of two the even one."""
    from tvm import tirx

    return tirx.nearbyint(x)


def _saturated(x: Any, dtype: str) -> Any:
    from tvm import tirx

    info = np.iinfo(dtype)
    least, most = (tirx.const(float(n), "float32") for n in (info.min, info.max))
    inside: Any = tirx.max(tirx.min(x, most), least)
    return inside.astype(dtype)
