"""Elementwise operators where ONNX defines more than TVM's converters compute: BitShift, Mod, Pow, IsInf, BitCast.

    BitShift   an amount that is negative or no less than the width gives what the sign extends to: -1 or 0
    Mod        of floats: fmod(x, y), exactly; with fmod=0 moved by y where its sign is not that of y
    Pow        the result has the base's type; powers of integers are products of integers
    IsInf      of one sign
    BitCast    the same bits, read as another type

Operands broadcast to each other as in NumPy. Raises ValueError for types that no definition here covers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx

from graphopt.targets.relax.emitters import Inputs, Node, emits
from graphopt.targets.relax.values import BROADCAST, ELEMENTWISE, Builder, Value

FLOATS = ("float32", "float64", "float16")
_POWER_BITS = 6
"""Bits of an integer's exponent: from 64 on, every power of a base but 0, 1 and -1 overflows 64 bits."""


@emits("BitShift")
def bit_shift(builder: Builder, node: Node, inputs: Inputs) -> list[Value] | None:
    data, amount = inputs[0], inputs[1]
    if data is None or amount is None or data.shape is None or amount.shape is None:
        return None
    left, width = _text(node, "direction") == "LEFT", 8 * np.dtype(data.dtype).itemsize

    def shifted(x: Any, by: Any) -> Any:
        from tvm import tirx

        zero = tirx.const(0, data.dtype)
        inside = by < tirx.const(width, amount.dtype)
        possible = tirx.min(by, tirx.const(width - 1, amount.dtype))
        if amount.dtype.startswith("int"):
            inside = tirx.all(by >= tirx.const(0, amount.dtype), inside)
            possible = tirx.max(possible, tirx.const(0, amount.dtype))
        signed = data.dtype.startswith("int")
        beyond = tirx.Select(x < zero, tirx.const(-1, data.dtype), zero) if signed and not left else zero
        return tirx.Select(inside, (x << possible) if left else (x >> possible), beyond)

    return [_broadcast(builder, shifted, data, amount, data.dtype, "bit_shift")]


@emits("Mod")
def mod(builder: Builder, node: Node, inputs: Inputs) -> list[Value] | None:
    a, b = inputs[0], inputs[1]
    if a is None or b is None or a.dtype not in FLOATS:
        return None
    wide = "float32" if a.dtype == "float16" else a.dtype

    def remainder(x: Any, y: Any) -> Any:
        from tvm import tirx

        x, y = x.astype(wide), y.astype(wide)
        zero = tirx.const(0.0, wide)
        rest = tirx.call_pure_extern(wide, "fmodf" if wide == "float32" else "fmod", x, y)  # x - trunc(x / y) y rounds
        if node.get("fmod", 0):
            return rest.astype(a.dtype)
        moved = tirx.Select(rest < zero, tirx.Select(y < zero, rest, rest + y), tirx.Select(y < zero, rest + y, rest))
        nothing = tirx.copysign(zero, y)
        return tirx.Select(rest == zero, nothing, moved).astype(a.dtype)

    return [_broadcast(builder, remainder, a, b, a.dtype, "mod")]


@emits("Pow")
def power(builder: Builder, node: Node, inputs: Inputs) -> list[Value] | None:
    base, exponent = inputs[0], inputs[1]
    if base is None or exponent is None or (base.dtype == exponent.dtype and base.dtype in FLOATS):
        return None
    integers = base.dtype not in FLOATS and exponent.dtype not in FLOATS

    def powered(x: Any, e: Any) -> Any:
        from tvm import tirx

        if integers:
            return _integer_power(x, e, base.dtype, exponent.dtype)
        return tirx.power(x.astype("float64"), e.astype("float64")).astype(base.dtype)

    return [_broadcast(builder, powered, base, exponent, base.dtype, "power")]


def _integer_power(x: Any, e: Any, base: str, exponent: str) -> Any:
    """Squares and products, which wrap; a negative exponent of anything but 1 and -1 gives the 0 it is cut to."""
    from tvm import tirx

    one, zero, none = tirx.const(1, base), tirx.const(0, base), tirx.const(0, exponent)
    result, square = one, x
    for bit in range(min(_POWER_BITS, 8 * np.dtype(exponent).itemsize - 1)):
        odd = (e >> tirx.const(bit, exponent)) & tirx.const(1, exponent)
        result = result * tirx.Select(odd == none, one, square)
        square = square * square
    result = tirx.Select(tirx.all(x == zero, e != none), zero, result)
    if not exponent.startswith("int"):
        return result
    unit = tirx.any(x == one, x == tirx.const(-1, base)) if base.startswith("int") else x == one
    return tirx.Select(tirx.all(e < none, tirx.Not(unit)), zero, result)


@emits("IsInf")
def is_inf(builder: Builder, node: Node, inputs: Inputs) -> list[Value] | None:
    data = inputs[0]
    if data is None or data.shape is None or data.dtype not in FLOATS:
        return None
    signs = [s for s, key in ((1.0, "detect_positive"), (-1.0, "detect_negative")) if node.get(key, 1)]
    if not signs:
        return [Value(data.shape, "bool", const=np.zeros(data.shape, bool))]

    wide = "float32" if data.dtype == "float16" else data.dtype

    def infinite(x: Any) -> Any:
        from tvm import tirx

        found = [x.astype(wide) == tirx.const(sign * np.inf, wide) for sign in signs]
        return found[0] if len(found) == 1 else tirx.any(*found)

    return [_mapped(builder, infinite, data, "bool", "is_inf")]


@emits("BitCast")
def bit_cast(builder: Builder, node: Node, inputs: Inputs) -> list[Value] | None:
    data = inputs[0]
    if data is None or data.shape is None:
        return None
    wanted = str(np.dtype(onnx.helper.tensor_dtype_to_np_dtype(int(node.get("to", 0)))))
    if wanted not in (*FLOATS, "bool", *(f"{kind}{8 << i}" for kind in ("int", "uint") for i in range(4))):
        raise ValueError(f"error: {wanted} cannot be compiled")

    def same_bits(x: Any) -> Any:
        from tvm import tirx

        boolean = "bool" in (data.dtype, wanted)  # a byte that is 0 or 1
        return x.astype(wanted) if boolean or data.dtype == wanted else tirx.reinterpret(wanted, x)

    return [_mapped(builder, same_bits, data, wanted, "bit_cast")]


def _mapped(builder: Builder, function: Callable[[Any], Any], data: Value, dtype: str, name: str) -> Value:
    """`function` of every element."""
    from tvm import te

    def compute(x: Any) -> Any:
        return te.compute(x.shape, lambda *i: function(x(*i)), name=name)

    return Value(data.shape, dtype, plain=builder.call(compute, builder.plain(data), pattern=ELEMENTWISE, name=name))


def _broadcast(builder: Builder, function: Callable[[Any, Any], Any], a: Value, b: Value, dtype: str, name: str):
    """`function` of every pair of elements of two values that broadcast to each other."""
    from tvm import te

    assert a.shape is not None and b.shape is not None
    whole = np.broadcast_shapes(a.shape, b.shape)

    def compute(x: Any, y: Any) -> Any:
        def of(operand: Any, shape: tuple[int, ...], places: tuple[Any, ...]) -> Any:
            own = places[len(places) - len(shape) :]
            return operand(*(0 if extent == 1 else place for extent, place in zip(shape, own, strict=True)))

        return te.compute(whole, lambda *i: function(of(x, a.shape, i), of(y, b.shape, i)), name=name)  # pyright: ignore

    made = builder.call(compute, builder.plain(a), builder.plain(b), pattern=BROADCAST, name=name)
    return Value(tuple(whole), dtype, plain=made)


def _text(node: Node, key: str) -> str:
    value = node.get(key, "")
    return value.decode() if isinstance(value, bytes) else str(value)
