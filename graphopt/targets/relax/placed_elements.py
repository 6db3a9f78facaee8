"""Operators whose elements come from or go to places that operands name: OneHot, EyeLike, ReverseSequence,
TensorScatter.

A place out of range touches nothing: OneHot has `off` there, TensorScatter drops the element, a sequence is no longer
than its axis. Any element type.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

from graphopt.targets.relax.constants import FOLD_LIMIT
from graphopt.targets.relax.emitters import Inputs, Node, emits
from graphopt.targets.relax.values import OPAQUE, Builder, Value, constant, known


@emits("OneHot")
def one_hot(builder: Builder, node: Node, inputs: Inputs) -> list[Value] | None:
    indices, depth, values = inputs[0], known(inputs[1]), inputs[2]
    if indices is None or indices.shape is None or values is None or depth is None:
        return None
    count, rank = int(depth.reshape(-1)[0]), len(indices.shape)
    axis = int(node.get("axis", -1)) % (rank + 1)
    shape = (*indices.shape[:axis], count, *indices.shape[axis:])
    made = builder.call(
        _one_hot,
        builder.plain(indices),
        builder.plain(values),
        shape=shape,
        axis=axis,
        dtype=indices.dtype,
        pattern=OPAQUE,
        name="one_hot",
    )
    return [Value(shape, values.dtype, plain=made)]


def _one_hot(indices: Any, values: Any, *, shape: tuple[int, ...], axis: int, dtype: str) -> Any:
    from tvm import te, tirx

    count = shape[axis]

    def element(*i: Any) -> Any:
        place = indices(*i[:axis], *i[axis + 1 :]).astype("int64")
        if not dtype.startswith("uint"):
            place = tirx.Select(place < tirx.const(0, "int64"), place + tirx.const(count, "int64"), place)
        return tirx.Select(place == i[axis].astype("int64"), values(1), values(0))

    return te.compute(shape, element, name="one_hot")


@emits("EyeLike")
def eye_like(builder: Builder, node: Node, inputs: Inputs) -> list[Value] | None:
    data = inputs[0]
    if data is None or data.shape is None or len(data.shape) != 2 or int(np.prod(data.shape)) > FOLD_LIMIT:
        return None
    kind = data.dtype
    if "dtype" in node.attributes:
        kind = str(np.dtype(onnx.helper.tensor_dtype_to_np_dtype(int(node.attributes["dtype"]))))
    return [constant(np.eye(*data.shape, k=int(node.get("k", 0)), dtype=kind))]


@emits("ReverseSequence")
def reverse_sequence(builder: Builder, node: Node, inputs: Inputs) -> list[Value] | None:
    data, lengths = inputs[0], inputs[1]
    if data is None or not data.shape or lengths is None:
        return None
    axes = {"time": int(node.get("time_axis", 0)), "batch": int(node.get("batch_axis", 1))}
    made = builder.call(
        _reversed, builder.moved(data), builder.plain(lengths), **axes, pattern=OPAQUE, name="reverse_sequence"
    )
    return [Value(data.shape, data.dtype, plain=made)]


def _reversed(data: Any, lengths: Any, *, time: int, batch: int) -> Any:
    from tvm import te, tirx

    steps = tirx.const(int(data.shape[time]), "int64")

    def element(*i: Any) -> Any:
        now, length = i[time].astype("int64"), tirx.min(lengths(i[batch]).astype("int64"), steps)
        place = tirx.Select(now < length, length - tirx.const(1, "int64") - now, now)
        return data(*i[:time], place, *i[time + 1 :])

    return te.compute(data.shape, element, name="reverse_sequence")


@emits("TensorScatter")
def tensor_scatter(builder: Builder, node: Node, inputs: Inputs) -> list[Value] | None:
    cache, update, start = [*inputs, None][:3]
    if cache is None or not cache.shape or update is None or not update.shape:
        return None
    if start is None:
        start = constant(np.zeros(cache.shape[0], np.int64))
    mode = node.get("mode", b"linear")
    made = builder.call(
        _written,
        builder.moved(cache),
        builder.moved(update),
        builder.plain(start),
        axis=int(node.get("axis", -2)) % len(cache.shape),
        circular=mode in (b"circular", "circular"),
        pattern=OPAQUE,
        name="tensor_scatter",
    )
    return [Value(cache.shape, cache.dtype, plain=made)]


def _written(cache: Any, update: Any, start: Any, *, axis: int, circular: bool) -> Any:
    from tvm import te, tirx

    whole, steps = (int(x.shape[axis]) for x in (cache, update))

    def element(*i: Any) -> Any:
        step = i[axis].astype("int64") - start(i[0]).astype("int64")
        if circular:
            step = tirx.floormod(step, tirx.const(whole, "int64"))
        fresh = tirx.all(step >= tirx.const(0, "int64"), step < tirx.const(steps, "int64"))
        place = tirx.max(tirx.min(step, tirx.const(steps - 1, "int64")), tirx.const(0, "int64"))
        return tirx.Select(fresh, update(*i[:axis], place, *i[axis + 1 :]), cache(*i))

    return te.compute(cache.shape, element, name="tensor_scatter")
