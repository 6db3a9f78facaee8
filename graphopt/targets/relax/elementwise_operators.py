"""Elementwise operators, in blocked form where that pays, and QuantizeLinear and DequantizeLinear.

Each emitter takes `(builder, node, inputs)` and returns its output values, or None when it does not apply: the
importer then asks TVM's own converter.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np

from graphopt.targets.relax import (
    byte_functions,
    computes,
    elementwise,
    exact_bytes,
    integer_computes,
    integer_layers,
    normal_share,
    normalized,
    views,
)
from graphopt.targets.relax.emitters import Inputs, Node, emits
from graphopt.targets.relax.values import (
    ELEMENTWISE,
    Builder,
    Encoded,
    Joint,
    Origin,
    Value,
    element_type,
)


def _unary(
    builder: Builder,
    value: Value,
    function: Callable,
    name: str,
    dtype: str | None = None,
    numbers: Callable | None = None,
) -> list[Value]:
    """`function` of every element; `numbers` is the same for numpy arrays, where there is such a form."""
    found = byte_functions.applied(builder, value, function, numbers)
    if found is not None:
        return [found]
    dtype = dtype or value.dtype
    if value.coded is not None:  # read the bytes: a float32 value made of them could end up in memory
        decode = value.coded.decode
        return _unary(builder, value.coded.source, lambda q: function(decode(q)), name, dtype)
    expression = elementwise.mapped(function, name)
    if value.is_blocked:
        source = builder.wide(value) if value.dtype == "float32" else value.blocked
        done = builder.call(expression, source, pattern=ELEMENTWISE, name=name)
        return [Value(value.shape, dtype, blocked=done, block=value.block)]
    return [
        Value(value.shape, dtype, plain=builder.call(expression, builder.plain(value), pattern=ELEMENTWISE, name=name))
    ]


def _scalar(value: Value | None) -> float | None:
    return None if value is None or value.const is None or value.const.size != 1 else float(value.const.reshape(()))


@emits("Clip", "Relu")
def clip(builder: Builder, node: Node, inputs: Inputs) -> list[Value] | None:
    data = inputs[0]
    if data is None or data.shape is None or data.dtype != "float32":
        return None
    if node.op_type == "Relu":
        return _clipped(builder, data, 0.0, None, "relu")
    if node.opset < 11:
        bounds = [node.get("min", None), node.get("max", None)]
    else:
        given = [inputs[i] if len(inputs) > i else None for i in (1, 2)]
        if any(v is not None and v.const is None for v in given):
            return None
        bounds = [_scalar(v) for v in given]
    return _clipped(builder, data, bounds[0], bounds[1], "clip")


def _clipped(builder: Builder, data: Value, low: float | None, high: float | None, name: str) -> list[Value]:
    if low is not None and high is not None:
        low = min(low, high)
    least, most = -math.inf if low is None else low, math.inf if high is None else high
    if data.sums is not None and data.readers == 1:
        return [replace(data, sums=data.sums.clipped(least, most))]
    if data.joint is not None and data.readers == 1:
        return [replace(data, joint=data.joint.clipped(least, most))]

    def numbers(x: np.ndarray) -> np.ndarray:
        return np.maximum(np.minimum(x, most), least)

    return _unary(builder, data, elementwise.clip_of(low, high), name, numbers=numbers)


@emits("LeakyRelu", "HardSigmoid", "HardSwish", "Sigmoid", "Tanh", "Exp", "Erf", "Gelu")
def activation(builder: Builder, node: Node, inputs: Inputs) -> list[Value] | None:
    data = inputs[0]
    if data is None or data.shape is None or data.dtype != "float32":
        return None
    divide = elementwise.divides(builder.lanes)
    function = {
        "LeakyRelu": lambda: elementwise.leaky_relu_of(float(node.get("alpha", 0.01))),
        "HardSigmoid": lambda: elementwise.hard_sigmoid_of(float(node.get("alpha", 0.2)), float(node.get("beta", 0.5))),
        "HardSwish": lambda: elementwise.hard_swish_of,
        "Sigmoid": lambda: partial(elementwise.sigmoid_of, divide=divide),
        "Tanh": lambda: partial(elementwise.tanh_of, divide=divide),
        "Exp": lambda: elementwise.exp_of,
        "Erf": lambda: elementwise.erf_of,
        "Gelu": lambda: (
            partial(elementwise.gelu_tanh_of, divide=divide)
            if _tanh_form(node)
            else partial(elementwise.gelu_of, table=builder.looks_up and builder.lanes == normal_share.LANES)
        ),
    }[node.op_type]()
    if node.op_type == "Exp" and data.has_filler:
        return None
    return _unary(builder, data, function, node.op_type.lower(), numbers=_numbers(node))


def _numbers(node: Node) -> Callable:
    """An activation as a function of float64 arrays."""
    alpha, beta = float(node.get("alpha", 0.01 if node.op_type == "LeakyRelu" else 0.2)), float(node.get("beta", 0.5))
    erf = np.vectorize(math.erf, otypes=[np.float64])
    return {
        "LeakyRelu": lambda x: np.where(x < 0, alpha * x, x),
        "HardSigmoid": lambda x: np.clip(alpha * x + beta, 0, 1),
        "HardSwish": lambda x: x * np.clip(x / 6 + 0.5, 0, 1),
        "Sigmoid": lambda x: 1 / (1 + np.exp(-np.clip(x, -700, 700))),
        "Tanh": np.tanh,
        "Exp": np.exp,
        "Erf": erf,
        "Gelu": (lambda x: x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))))
        if _tanh_form(node)
        else (lambda x: x / 2 * (1 + erf(x * np.sqrt(0.5)))),
    }[node.op_type]


def _tanh_form(node: Node) -> bool:
    form = node.get("approximate", b"none")
    return form in (b"tanh", "tanh")


@emits("Add", "Sub", "Mul", "Div", "Max", "Min", "Sum")
def binary(builder: Builder, node: Node, inputs: Inputs) -> list[Value] | None:
    operation = {
        "Add": "add",
        "Sub": "subtract",
        "Mul": "multiply",
        "Div": "divide",
        "Max": "maximum",
        "Min": "minimum",
        "Sum": "add",
    }[node.op_type]
    values = [v for v in inputs if v is not None]
    if len(values) < 2 or len({v.dtype for v in values}) != 1 or values[0].dtype != "float32":
        return None
    total = values[0]
    for value in values[1:]:
        found = _combine(builder, operation, total, value, node.op_type == "Div")
        if found is None:
            return None
        total = found
    return [total]


def _combine(builder: Builder, operation: str, a: Value, b: Value, divides: bool) -> Value | None:
    if a.shape is None or b.shape is None:
        return None
    divisor = _scalar(b) if divides else None
    if divisor and np.isfinite(np.float32(1 / divisor)):  # within half a unit in the last place, and ten times as fast
        b = Value(b.shape, b.dtype, const=np.full(b.shape or (), 1 / divisor, np.float32))
        operation, divides = "multiply", False
    shape = np.broadcast_shapes(a.shape, b.shape or ())
    found = _of_bytes(builder, operation, a, b) if shape == a.shape else None
    if found is not None:
        return found
    factor = _scalar(b) if operation == "multiply" else None
    if isinstance(a, views.Strided) and factor is not None and shape == a.shape:
        return a.scaled(factor)
    if operation == "multiply" and (later := normalized.scaled(builder, a, b)) is not None:
        return later
    if operation == "add" and a.sums is not None and a.readers == 1 and b.const is not None and _one_a_channel(b, a):
        added = a.sums.plus(b.const)
        if added is not None:
            return replace(a, sums=added)
    builder.meet(a, b)
    for like in (a, b):
        if not like.is_blocked or (divides and like.has_filler) or not _spans(like, shape):
            continue
        left, right = builder.operand(a, like), builder.operand(b, like)
        if left is not None and right is not None:
            if a.encoded is not None and b.encoded is not None and operation in ("add", "multiply"):
                stored = left.expression, right.expression
                joint = Joint(operation, a.encoded, b.encoded, stored) if _are_bytes(*stored) else None
                if joint is not None:
                    return Value(shape, a.dtype, joint=joint, block=like.lanes)
            done = builder.combine(operation, left, right)
            return Value(shape, a.dtype, blocked=done, block=like.lanes)
    if operation == "add" and (waiting := normalized.row_sum(builder, a, b)) is not None:
        return waiting
    return Value(shape, a.dtype, plain=builder.combine(operation, builder.readable(a), builder.readable(b)))


def _one_a_channel(value: Value, like: Value) -> bool:
    """Whether it is a constant of one number a channel of the picture `like`, or one in all."""
    if value.const is None or like.shape is None or value.const.ndim > 4:
        return False
    shape = (1,) * (4 - value.const.ndim) + value.const.shape
    return shape in ((1, like.channels, 1, 1), (1, 1, 1, 1))


def _are_bytes(*expressions) -> bool:
    return all(element_type(each) in computes.BYTES for each in expressions)


def _of_bytes(builder: Builder, operation: str, a: Value, b: Value) -> Value | None:
    """Two functions of the same bytes, or one and a number, as one function of bytes."""
    number = _scalar(b)
    if number is None or operation not in byte_functions.BINARY:
        return byte_functions.joined(builder, operation, a, b)
    return byte_functions.with_number(builder, operation, a, number)


def _spans(value: Value, shape: tuple[int, ...]) -> bool:
    """True when `value` broadcasts to `shape` over its spatial axes or not at all, so blocking by it is right."""
    return value.shape is not None and len(shape) == 4 and value.shape == shape


@emits("Identity", "Dropout")
def identity(builder: Builder, node: Node, inputs: Inputs) -> list[Value] | None:
    data = inputs[0]
    if data is None or data.shape is None or node.outputs == 1:
        return None if data is None else [data]
    kept = np.ones(data.shape, np.float32 if node.opset < 7 else bool)  # what Dropout drops in inference: nothing
    return [data, Value(data.shape, str(kept.dtype), const=kept)]


# ---- quantization


@emits("QuantizeLinear", "DequantizeLinear")
def requantize(builder: Builder, node: Node, inputs: Inputs) -> list[Value] | None:
    data, scale = inputs[0], inputs[1]
    zero = inputs[2] if len(inputs) > 2 else None
    if data is not None and node.get("block_size", 0):
        return exact_bytes.blocked(builder, node, inputs)
    if data is None or data.shape is None:
        return None
    factor, offset = _scalar(scale), 0.0 if zero is None else _scalar(zero)
    if factor is None or offset is None or scale is None or scale.dtype != "float32":
        return None
    if node.op_type == "DequantizeLinear":
        if data.dtype not in ("uint8", "int8", "int16", "uint16", "int32"):
            return None
        if data.dtype in computes.BYTES:
            levels = byte_functions.dequantized(builder, data, factor, int(offset))
            return [Value(data.shape, "float32", encoded=Encoded(data, factor, int(offset)), levels=levels)]
        return _unary(builder, data, elementwise.dequantize_of(factor, int(offset)), "dequantize", "float32")
    dtype = "uint8" if zero is None else zero.dtype
    known = data.encoded
    if known is not None and (known.source.dtype, known.scale, known.zero_point) == (dtype, factor, int(offset)):
        return [known.source]  # nothing happened to it since it was dequantized
    if dtype not in ("uint8", "int8", "int16", "uint16") or data.dtype != "float32":
        return None
    if data.readers == 1 and dtype in computes.BYTES and (data.sums is not None or data.joint is not None):
        finish = integer_layers.requantized if data.sums is not None else integer_layers.joint_bytes
        found = finish(builder, data, factor, int(offset), dtype)
        if found is not None:
            return [found]
    found = normalized.quantized(data, factor, int(offset), dtype)
    if found is not None:
        return [found]
    looked_up = byte_functions.quantized(builder, data, factor, int(offset), dtype) if dtype in computes.BYTES else None
    if looked_up is not None:
        return [looked_up]
    divide = not data.is_blocked or data.coded is not None  # what a kernel computed is no number to the last bit
    quantize = elementwise.quantize_of(factor, int(offset), dtype, divide=divide)
    found = _unary(builder, data, quantize, "quantize", dtype)
    if (
        dtype == builder.byte_type
        and data.is_image
        and data.channels <= integer_computes.QUAD
        and found[0].blocked is None
    ):
        found[0].origin = Origin(builder.plain(data), factor, int(offset))
    return found


@emits("PRelu")
def p_relu(builder: Builder, node: Node, inputs: Inputs) -> list[Value] | None:
    """A vector of slopes that broadcasts to nothing has one for each channel, as before opset 7; others are TVM's."""
    from tvm import relax

    data, slope = inputs[0], inputs[1]
    if data is None or slope is None or data.shape is None or slope.shape is None or data.dtype != "float32":
        return None
    if len(slope.shape) != 1 or len(data.shape) < 3 or slope.shape[0] in (1, data.shape[-1]):
        return None
    x = builder.plain(data)
    factors = builder.reshape(builder.plain(slope), (slope.shape[0], *(1,) * (len(data.shape) - 2)))
    below = builder.emit(relax.op.minimum(x, relax.const(0, "float32")))
    above = builder.emit(relax.op.maximum(x, relax.const(0, "float32")))
    scaled = builder.emit(relax.op.multiply(below, factors))
    return [Value(data.shape, "float32", plain=builder.emit(relax.op.add(above, scaled)))]
