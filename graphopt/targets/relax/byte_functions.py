"""Elementwise operators on dequantized bytes: tables of 256 numbers, composed until they are quantized again.

`x * Sigmoid(x)` with a Q/DQ pair behind the Sigmoid is three operators of two operands, but one function of one byte.
So an operator on a value that is a function of bytes gives another such value, an operator on two functions of the same
bytes too, and QuantizeLinear makes one table of whatever came together.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping

import numpy as np

from graphopt.targets.relax import elementwise, lookup
from graphopt.targets.relax.values import ELEMENTWISE, Builder, Levels, Value

BINARY: Mapping[str, Callable] = {
    "add": np.add, "subtract": np.subtract, "multiply": np.multiply, "maximum": np.maximum, "minimum": np.minimum,
}  # fmt: skip
"""TVM's names of operators that two functions of the same bytes are joined by."""


def levels_of(value: Value | None) -> Levels | None:
    """The value as a function of unsigned bytes, if it is one."""
    if value is None:
        return None
    return value.levels or (value.encoded.levels if value.encoded is not None else None)


def applied(builder: Builder, value: Value, function: Callable, numbers: Callable | None) -> Value | None:
    """An elementwise function behind a function of bytes; `numbers` is the same for numpy arrays.

    None where there is no such, or tables do not pay.
    """
    found = levels_of(value) if builder.looks_up and numbers is not None else None
    if found is None or numbers is None:
        return None
    with np.errstate(over="ignore"):
        table = numbers(found.table.astype(np.float64)).astype(np.float32)
    return Value(value.shape, "float32", levels=Levels(found.source, lambda q: function(found.decode(q)), table))


def joined(builder: Builder, operation: str, a: Value, b: Value) -> Value | None:
    """An operator on two functions of the same bytes; None where they are not."""
    first, second = levels_of(a), levels_of(b)
    if not builder.looks_up or first is None or second is None or operation not in BINARY:
        return None
    if first.source is not second.source:
        return None
    table = BINARY[operation](first.table, second.table).astype(np.float32)

    def decode(q):
        return _operator(operation)(first.decode(q), second.decode(q))

    return Value(a.shape, "float32", levels=Levels(first.source, decode, table))


def with_number(builder: Builder, operation: str, a: Value, number: float) -> Value | None:
    """A function of bytes and a number joined by an operator."""

    def function(x):
        from tvm import tirx

        return _operator(operation)(x, tirx.const(float(np.float32(number)), "float32"))

    return applied(builder, a, function, lambda x: BINARY[operation](x, np.float32(number)))


def _operator(operation: str) -> Callable:
    """An operator of `BINARY` on float32 expressions."""
    from tvm import tirx

    return {"add": operator.add, "subtract": operator.sub, "multiply": operator.mul, "maximum": tirx.max,
            "minimum": tirx.min}[operation]  # fmt: skip


def quantized(builder: Builder, value: Value, scale: float, zero_point: int, dtype: str) -> Value | None:
    """A function of bytes as bytes: one table. None where the value is none, or nothing but dequantized bytes."""
    found = value.levels if value.encoded is None else None
    if found is None:
        return None
    info = np.iinfo(dtype)
    table = np.clip(np.rint(found.table / np.float32(scale)) + zero_point, info.min, info.max).astype(dtype)
    expression = elementwise.mapped(lookup.looked_up(table, dtype), "lookup")
    if found.source.blocked is not None:
        done = builder.call(expression, builder.blocked(found.source), pattern=ELEMENTWISE, name="lookup")
        result = Value(value.shape, dtype, blocked=done, block=found.source.block)
    else:
        done = builder.call(expression, builder.moved(found.source), pattern=ELEMENTWISE, name="lookup")
        result = Value(value.shape, dtype, plain=done)
    back = elementwise.quantize_of(scale, zero_point, dtype)
    result.made_of = Levels(found.source, lambda q: back(found.decode(q)), table.astype(np.float32))
    return result


def dequantized(builder: Builder, data: Value, scale: float, zero_point: int) -> Levels | None:
    """Bytes that came out of a table, dequantized: still a function of the bytes that went in."""
    made = data.made_of
    if made is None or not builder.looks_up:
        return None
    back = elementwise.dequantize_of(scale, zero_point)
    table = (made.table - np.float32(zero_point)) * np.float32(scale)
    return Levels(made.source, lambda q: back(made.decode(q)), table)
