"""Products of two activations."""

from __future__ import annotations

from typing import Any

import numpy as np

from graphopt.targets.relax import views
from graphopt.targets.relax.values import FUSABLE_ROOT, Builder, Value


def product_of_activations(builder: Builder, left: Value, right: Value) -> Value | None:
    """ONNX MatMul of (..., M, K) and (..., K, N); None where it does not apply."""
    if left.shape is None or right.shape is None or len(left.shape) < 2 or len(right.shape) < 2:
        return None
    a, b = views.strided(builder, left), views.strided(builder, right)
    if a is None or b is None:
        return None
    lead = np.broadcast_shapes(left.shape[:-2], right.shape[:-2])
    if not lead:
        lead = (1,)
    depth = left.shape[-1]
    rows = np.broadcast_to(a.places, (*lead, *left.shape[-2:])).strides
    columns = np.broadcast_to(b.places, (*lead, *right.shape[-2:])).strides
    made = builder.call(
        batch_product,
        a.base.flat,
        b.base.flat,
        shape=(*lead, left.shape[-2], right.shape[-1]),
        depth=depth,
        left=(rows, a.offset, a.factor * b.factor),
        right=(columns, b.offset, 1.0),
        pattern=FUSABLE_ROOT,
        name="batch_matmul",
    )
    shape = (*np.broadcast_shapes(left.shape[:-2], right.shape[:-2]), left.shape[-2], right.shape[-1])
    if shape != (*lead, *shape[-2:]):
        made = builder.reshape(made, shape)
    return Value(shape, "float32", plain=made)


def batch_product(a, b, *, shape: tuple[int, ...], depth: int, left, right):
    """Sums over k of a at (..., m, k) times b at (..., k, n), both flat, each read at (strides, offset, factor)."""
    from tvm import te

    k: Any = te.reduce_axis((0, depth), "k")

    def cell(*i):
        *lead, m, n = i
        first = views.element(a, (*lead, m, k), *left)
        return te.sum(first * views.element(b, (*lead, k, n), *right), axis=k)

    return te.compute(shape, cell, name="batch_matmul")
