"""Products and means, however they are written.

x * (c * (x * x)), (c * x) * Pow(x, 2) and x * x * x / d are one product: the constant c (or 1/d) and x to the third.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from graphopt import graph as g
from graphopt.passes.fusion.pattern import View, producer, scalar
from graphopt.shapes.dimensions import Size

_DEEPEST = 8


@dataclass
class Product:
    """constant * arrays * the values, each to its power; and the nodes that multiply."""

    constant: float = 1.0
    arrays: list[np.ndarray] = field(default_factory=list)
    powers: dict[ir.Value, int] = field(default_factory=dict)
    nodes: set[ir.Node] = field(default_factory=set)

    def is_of(self, constant: float, powers: dict[ir.Value, int], close) -> bool:
        """Whether it is `constant` times these powers and nothing else; `close(a, b)` compares constants."""
        return self.powers == powers and not self.arrays and close(self.constant, constant)


def product(value: ir.Value | None, bases: Collection[ir.Value]) -> Product:
    """`value` as a product of `bases` and of whatever Mul, Div, Reciprocal and Pow by an integer do not take apart."""
    found = Product()
    if value is not None:
        _multiply(found, value, 1, frozenset(bases), _DEEPEST)
    return found


def _multiply(found: Product, value: ir.Value, power: int, bases: frozenset[ir.Value], depth: int) -> None:
    array = g.constant_of(value)
    if array is not None and array.dtype.kind == "f":
        if array.size == 1 and array.reshape(-1)[0] != 0:
            found.constant *= float(array.reshape(-1)[0]) ** power
        elif power == 1:
            found.arrays.append(array)
        else:
            found.powers[value] = found.powers.get(value, 0) + power
        return
    node = None if value in bases or depth == 0 else producer(value, "Mul", "Div", "Reciprocal", "Pow")
    exponent = scalar(node.inputs[1]) if node is not None and node.op_type == "Pow" else 1.0
    if node is None or exponent is None or exponent != int(exponent) or not 1 <= exponent <= 4:
        found.powers[value] = found.powers.get(value, 0) + power
        if found.powers[value] == 0:
            del found.powers[value]
        return
    found.nodes.add(node)
    first, second = node.inputs[0], g.input_of(node, 1)
    assert first is not None
    if node.op_type == "Pow":
        _multiply(found, first, power * int(exponent), bases, depth - 1)
    elif node.op_type == "Reciprocal":
        _multiply(found, first, -power, bases, depth - 1)
    else:
        assert second is not None
        _multiply(found, first, power, bases, depth - 1)
        _multiply(found, second, power if node.op_type == "Mul" else -power, bases, depth - 1)


@dataclass(frozen=True)
class Mean:
    """`value` averaged over `axes` (counted from the front), by `nodes`."""

    value: ir.Value
    axes: tuple[int, ...]
    nodes: frozenset[ir.Node]


def mean_of(view: View, value: ir.Value | None) -> Mean | None:
    """`value` as a mean: ReduceMean, or ReduceSum times 1/n or over n, n being the number of elements summed."""
    node = producer(value, "ReduceMean")
    if node is not None:
        return _reduction(view, node, frozenset([node]))
    node = producer(value, "Mul", "Div")
    if node is None:
        return None
    for total, other in ((0, 1), (1, 0)) if node.op_type == "Mul" else ((0, 1),):
        summed, factor = producer(node.inputs[total], "ReduceSum"), scalar(node.inputs[other])
        if summed is None or not factor:
            continue
        found = _reduction(view, summed, frozenset([node, summed]))
        shape = view.shape(summed.inputs[0])
        if found is None or shape is None:
            return None
        sizes = [shape[axis] for axis in found.axes]
        if not all(isinstance(size, int) and size > 0 for size in sizes):
            return None
        count = int(np.prod([int(size) for size in sizes if isinstance(size, int)]))
        share = factor if node.op_type == "Mul" else 1 / factor
        return found if abs(share * count - 1) <= 2.0**-22 else None  # 1/n is rounded to float32
    return None


def _reduction(view: View, node: ir.Node, nodes: frozenset[ir.Node]) -> Mean | None:
    value = node.inputs[0]
    shape = view.shape(value)
    axes = g.attribute(node, "axes", None)
    axes = list(axes) if axes is not None else g.integers_of(g.input_of(node, 1))
    if value is None or shape is None or not axes:
        return None
    return Mean(value, tuple(sorted(axis % len(shape) for axis in axes)), nodes)


def restored(value: ir.Value | None, bases: Collection[ir.Value] = ()) -> tuple[ir.Value | None, frozenset[ir.Node]]:
    """What `value` is a Reshape, Unsqueeze or Squeeze of, and the nodes that reshape: a reduction's lost dimensions."""
    nodes: set[ir.Node] = set()
    while len(nodes) < _DEEPEST and value not in bases:
        node = producer(value, "Reshape", "Unsqueeze", "Squeeze")
        if node is None:
            break
        nodes.add(node)
        value = node.inputs[0]
    return value, frozenset(nodes)


def is_statistic(view: View, value: ir.Value | None, shape: tuple[Size, ...], axes: tuple[int, ...]) -> bool:
    """Whether `value` has `shape` with 1 on `axes`: one number for each place along the other axes."""
    found = view.shape(value)
    return found == tuple(1 if axis in axes else size for axis, size in enumerate(shape))


def vector_along(array: np.ndarray, shape: tuple[Size, ...], axes: tuple[int, ...]) -> np.ndarray | None:
    """A constant that varies along `axes` of a value of `shape` only, as an array of their sizes; else None.

    The result is a copy broadcast to the sizes, in the order of `axes`.
    """
    if array.ndim > len(shape):
        return None
    full = array.reshape((1,) * (len(shape) - array.ndim) + array.shape)
    sizes = [shape[axis] for axis in axes]
    for axis, size in enumerate(full.shape):
        if size != 1 and (axis not in axes or size != shape[axis]):
            return None
    if not all(isinstance(size, int) for size in sizes):
        return None
    kept = full.reshape([full.shape[axis] for axis in axes])
    return np.broadcast_to(kept, [int(size) for size in sizes if isinstance(size, int)]).copy()
