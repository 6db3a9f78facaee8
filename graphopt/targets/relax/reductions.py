"""ReduceMax and ReduceMin of floats, from the right start: the largest of numbers that are all -inf is -inf.

TVM starts at the least finite number instead, and attention finds its fully masked rows by this very question.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from graphopt.targets.relax.emitters import Inputs, Node, emits
from graphopt.targets.relax.values import Builder, Value


@emits("ReduceMax", "ReduceMin")
def extremum(builder: Builder, node: Node, inputs: Inputs) -> list[Value] | None:
    data = inputs[0]
    if data is None or not data.shape or 0 in data.shape:
        return None
    if data.dtype == "bool":
        return _extremum_of_bool(builder, node, inputs)
    if data.dtype not in ("float32", "float64", "float16", "uint8"):
        return None
    axes = node.get("axes", None)
    operand = inputs[1] if len(inputs) > 1 else None
    if operand is not None:
        if operand.const is None:
            return None
        axes = operand.const.reshape(-1).tolist()
    rank = len(data.shape)
    if not axes:
        if node.get("noop_with_empty_axes", 0):
            return [data]
        axes = range(rank)
    reduced = sorted({int(a) % rank for a in axes})
    kept = tuple(d for i, d in enumerate(data.shape) if i not in reduced)
    shape = tuple(1 if i in reduced else d for i, d in enumerate(data.shape))
    made = builder.call(
        _extremum, builder.plain(data), axes=reduced, largest=node.op_type == "ReduceMax", name="extremum"
    )
    if not node.get("keepdims", 1):
        return [Value(kept, data.dtype, plain=made)]
    return [Value(shape, data.dtype, plain=builder.reshape(made, shape))]


def _extremum_of_bool(builder: Builder, node: Node, inputs: Inputs) -> list[Value] | None:
    """Of the bytes 0 and 1 that booleans are."""
    from tvm import relax

    data = inputs[0]
    assert data is not None
    stored = Value(data.shape, "uint8", plain=builder.emit(relax.op.astype(builder.plain(data), "uint8")))
    found = extremum(builder, node, [stored, *inputs[1:]])
    if found is None:
        return None
    back = builder.emit(relax.op.astype(builder.plain(found[0]), "bool"))
    return [Value(found[0].shape, "bool", plain=back)]


def _extremum(data: Any, *, axes: list[int], largest: bool) -> Any:
    """The largest or least element over `axes`, which go."""
    from tvm import te, tirx

    start = -np.inf if largest else np.inf
    if "int" in str(data.dtype):
        info = np.iinfo(str(data.dtype))
        start = int(info.min if largest else info.max)
    choose = tirx.max if largest else tirx.min
    reduce = te.comm_reducer(
        lambda a, b: choose(a, b), lambda dtype: tirx.const(start, dtype), name="max" if largest else "min"
    )
    over = {axis: te.reduce_axis((0, data.shape[axis]), f"k{axis}") for axis in axes}
    sizes = [data.shape[i] for i in range(len(data.shape)) if i not in axes]

    def element(*kept: Any) -> Any:
        places = iter(kept)
        return reduce(
            data[tuple(over[i] if i in over else next(places) for i in range(len(data.shape)))],
            axis=list(over.values()),
        )

    return te.compute(sizes, element, name="extremum")
