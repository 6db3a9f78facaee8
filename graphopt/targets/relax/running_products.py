"""CumProd, and LpNormalization: what an axis multiplies or adds up to.

CumProd           y[i] = x[0] ... x[i]; exclusive without x[i]; reverse from the other end
LpNormalization   x / (sum of |x|), or x / sqrt(sum of x x); 0 where that is 0
"""

from __future__ import annotations

from typing import Any

from graphopt.targets.relax.emitters import Inputs, Node, emits
from graphopt.targets.relax.values import Builder, Value, known

_FLOATS = ("float32", "float64", "float16")


@emits("CumProd")
def cum_prod(builder: Builder, node: Node, inputs: Inputs) -> list[Value] | None:
    data, axis = inputs[0], known(inputs[1])
    if data is None or not data.shape or axis is None:
        return None
    from tvm import relax

    place = int(axis.reshape(-1)[0]) % len(data.shape)
    x, backwards = builder.plain(data), bool(node.get("reverse", 0))
    if backwards:
        x = builder.emit(relax.op.flip(x, place))
    done = builder.emit(relax.op.cumprod(x, place, data.dtype, bool(node.get("exclusive", 0))))
    if backwards:
        done = builder.emit(relax.op.flip(done, place))
    return [Value(data.shape, data.dtype, plain=done)]


@emits("LpNormalization")
def lp_normalization(builder: Builder, node: Node, inputs: Inputs) -> list[Value] | None:
    from tvm import relax

    data, power = inputs[0], int(node.get("p", 2))
    if data is None or not data.shape or data.dtype not in _FLOATS:
        return None
    if power not in (1, 2):
        raise ValueError(f"error: p = {power}")
    axis: Any = [int(node.get("axis", -1)) % len(data.shape)]
    x = builder.plain(data)
    sized = relax.op.abs(x) if power == 1 else relax.op.multiply(x, x)
    norm = builder.emit(relax.op.sum(builder.emit(sized), axis, keepdims=True))
    if power == 2:
        norm = builder.emit(relax.op.sqrt(norm))
    nothing = relax.const(0, data.dtype)
    divided = builder.emit(relax.op.divide(x, norm))
    return [
        Value(
            data.shape,
            data.dtype,
            plain=builder.emit(
                relax.op.where(builder.emit(relax.op.equal(norm, nothing)), relax.op.zeros_like(x), divided)
            ),
        )
    ]
