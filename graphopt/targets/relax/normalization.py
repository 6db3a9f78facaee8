"""Softmax and layer normalization: operators that look at a whole row.

Rows are the last axis. Each is one tensor expression of three blocks, so that the template `rowwise` can run them over
a row while it is in the first-level cache: `row_max`, `row_exp`, `softmax`; `row_sum`, `row_squares`, `layer_norm`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from graphopt.targets.relax import elementwise, views
from graphopt.targets.relax.emitters import Inputs, Node, emits
from graphopt.targets.relax.normalized import Normalization, Normalized, layer_norm_rows, supported
from graphopt.targets.relax.values import OPAQUE, Builder, Value


def softmax_rows(data):
    """exp(x - max) / sum(exp(x - max)) over the last axis; the sum is divided by once a row."""
    from tvm import te, tirx

    *lead, columns = (int(d) for d in data.shape)
    k, j = te.reduce_axis((0, columns), "k"), te.reduce_axis((0, columns), "j")
    top: Any = te.compute(lead, lambda *i: te.max(data[(*i, k)], axis=k), name="row_max")
    total: Any = te.compute(
        lead, lambda *i: te.sum(elementwise.share_of(data[(*i, j)] - top[i]), axis=j), name="row_exp"
    )
    one = tirx.const(1.0, "float32")
    return te.compute(
        (*lead, columns),
        lambda *i: elementwise.share_of(data[i] - top[i[:-1]]) * (one / total[i[:-1]]),
        name="softmax",
    )


def _rows(builder: Builder, value: Value, rows: int, columns: int):
    """A Relax expression of the value as a matrix."""
    assert value.shape is not None
    if value.shape == (rows, columns):
        return builder.plain(value)
    found = views.reshaped(builder, value, (rows, columns))
    return builder.reshape(builder.plain(value), (rows, columns)) if found is None else builder.plain(found)


def _unfolded(builder: Builder, matrix, rows: int, columns: int, shape: tuple[int, ...]) -> Value:
    """A matrix in the shape that its value has in the model."""
    value = Value((rows, columns), "float32", plain=matrix)
    if shape == (rows, columns):
        return value
    return views.reshaped(builder, value, shape) or Value(shape, "float32", plain=builder.reshape(matrix, shape))


@emits("Softmax")
def softmax(builder: Builder, node: Node, inputs: Inputs) -> list[Value] | None:
    data = inputs[0]
    if data is None or data.dtype != "float32" or not data.shape or 0 in data.shape:
        return None
    rank = len(data.shape)
    axis = int(node.get("axis", 1 if node.opset < 13 else -1)) % rank
    if node.opset >= 13 and axis != rank - 1 and any(d != 1 for d in data.shape[axis + 1 :]):
        return None
    rows, columns = math.prod(data.shape[:axis]), math.prod(data.shape[axis:])
    if node.opset >= 13:
        columns = data.shape[axis]
    flat = _rows(builder, data, rows, columns)
    done = builder.call(softmax_rows, flat, pattern=OPAQUE, name="softmax")
    return [_unfolded(builder, done, rows, columns, data.shape)]


@emits("LayerNormalization")
def layer_normalization(builder: Builder, node: Node, inputs: Inputs) -> list[Value] | None:
    data, scale = inputs[0], inputs[1]
    bias = inputs[2] if len(inputs) > 2 else None
    if data is None or data.dtype != "float32" or not data.shape or 0 in data.shape or node.outputs > 1:
        return None
    axis = int(node.get("axis", -1)) % len(data.shape)
    rows, columns = math.prod(data.shape[:axis]), math.prod(data.shape[axis:])
    if scale is None or scale.const is None or scale.const.size not in (1, columns):
        return None
    if bias is not None and (bias.const is None or bias.const.size not in (1, columns)):
        return None
    shift = np.zeros(1, np.float32) if bias is None or bias.const is None else bias.const
    vectors = [np.broadcast_to(v.reshape(-1), (columns,)).astype(np.float32) for v in (scale.const, shift)]
    known = Normalization(data, rows, columns, vectors[0], vectors[1], float(node.get("epsilon", 1e-5)))
    if supported(builder) and axis == len(data.shape) - 1:
        return [Normalized(builder, known, data.shape)]
    flat = _rows(builder, data, rows, columns)
    done = builder.call(
        layer_norm_rows,
        [flat],
        [builder.constant(v) for v in vectors],
        epsilon=known.epsilon,
        pattern=OPAQUE,
        name="layer_norm",
    )
    return [_unfolded(builder, done, rows, columns, data.shape)]
