"""Normalizations written out.

    d = x - mean(x),  v = mean(d * d)  or  mean(x * x) - mean(x)^2  or  Max(of that, 0)
    d / sqrt(v + e) * scale + bias   over the axes behind the channels  =  InstanceNormalization(x, scale, bias, e)
                                     over other axes                    =  LayerNormalization(x, scale, bias, e)
    x / sqrt(mean(x * x) + e) * scale                                   =  RMSNormalization(x, scale, e)

LayerNormalization and RMSNormalization work on the last axes; over one other axis, x is transposed and back.

Conditions: float32; e a positive constant; sqrt written as Sqrt or Pow by 0.5; the factors in any order, a division or
a Reciprocal; means as ReduceMean, or ReduceSum times 1/n or over n; scale and bias constants that vary along the
normalized axes only (InstanceNormalization: along the channels only; without a scale or bias they are 1 and 0). A
variance as mean(x * x) - mean(x)^2 is computed as mean(d * d) then, which loses fewer digits: where the mean is far
from zero the results differ by what the original lost.
Reference: Ulyanov et al., Instance Normalization, arXiv:1607.08022; Ba et al., Layer Normalization, arXiv:1607.06450;
Zhang and Sennrich, Root Mean Square Layer Normalization, NeurIPS 2019.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt import graph as g
from graphopt.passes.fusion.algebra import Mean, is_statistic, mean_of, product, restored, vector_along
from graphopt.passes.fusion.pattern import Fusion, View, Writer, is_float, producer, reader, scalar
from graphopt.shapes.dimensions import Size

ANCHORS = ("Sqrt", "Pow")
OPSETS = {"InstanceNormalization": 6, "LayerNormalization": 17, "RMSNormalization": 23}
_MOST_FACTORS = 4


@dataclass
class _Variance:
    """`squares` is mean(x * x); or, of `centred`, x - mean(x), it is the mean of the squares."""

    x: ir.Value
    axes: tuple[int, ...]
    centred: bool
    nodes: set[ir.Node]


def match(node: ir.Node, view: View) -> Fusion | None:
    if node.op_type == "Pow" and scalar(node.inputs[1]) != 0.5:
        return None
    added = producer(node.inputs[0], "Add")
    if added is None or not is_float(node.outputs[0]):
        return None
    for data, constant in ((0, 1), (1, 0)):
        epsilon = scalar(added.inputs[constant])
        if epsilon is None or not 0 < epsilon < 1:
            continue
        found = _variance(view, added.inputs[data])
        if found is not None:
            found.nodes |= {node, added}
            return _normalized(node, epsilon, found, view)
    return None


def _variance(view: View, value: ir.Value | None) -> _Variance | None:
    inner, reshaping = restored(value)
    clamped = producer(inner, "Max", "Relu")
    nodes = set(reshaping)
    if clamped is not None:
        numbers = [scalar(v) for v in clamped.inputs]
        if clamped.op_type == "Max" and (len(numbers) != 2 or 0.0 not in numbers):
            return None
        inner, more = restored(next(v for v, n in zip(clamped.inputs, numbers, strict=True) if n is None))
        nodes |= {clamped, *more}
    squares = mean_of(view, inner)
    if squares is not None:
        return _mean_of_squares(view, squares, nodes)
    difference = producer(inner, "Sub")
    if difference is None:
        return None
    squares = mean_of(view, difference.inputs[0])
    if squares is None:
        return None
    whole = _mean_of_squares(view, squares, nodes)
    if whole is None or whole.centred:
        return None
    mean = _squared_mean(view, difference.inputs[1])
    if mean is None or (mean.value, mean.axes) != (whole.x, whole.axes):
        return None
    whole.nodes |= {difference, *mean.nodes}
    return _Variance(whole.x, whole.axes, True, whole.nodes)


def _squared_mean(view: View, value: ir.Value | None) -> Mean | None:
    """`value` as the square of a mean."""
    node = producer(value, "Mul", "Pow")
    if node is None:
        return None
    if node.op_type == "Mul" and node.inputs[0] is not node.inputs[1]:
        return None
    if node.op_type == "Pow" and scalar(node.inputs[1]) != 2:
        return None
    inner, reshaping = restored(node.inputs[0])
    mean = mean_of(view, inner)
    return None if mean is None else Mean(mean.value, mean.axes, mean.nodes | reshaping | {node})


def _mean_of_squares(view: View, squares: Mean, nodes: set[ir.Node]) -> _Variance | None:
    square = producer(squares.value, "Mul", "Pow")
    if square is None or (square.op_type == "Mul" and square.inputs[0] is not square.inputs[1]):
        return None
    if square.op_type == "Pow" and scalar(square.inputs[1]) != 2:
        return None
    base = square.inputs[0]
    assert base is not None
    nodes = {*nodes, *squares.nodes, square}
    centred = _centred(view, base)
    if centred is not None and centred.axes == squares.axes:
        return _Variance(centred.value, centred.axes, True, nodes | centred.nodes)
    return _Variance(base, squares.axes, False, nodes)


def _centred(view: View, value: ir.Value) -> Mean | None:
    """The mean that `value` is its operand's difference from: x - mean(x)."""
    node = producer(value, "Sub")
    if node is None:
        return None
    inner, reshaping = restored(node.inputs[1])
    mean = mean_of(view, inner)
    shape = view.shape(node.inputs[0])
    if mean is None or shape is None or mean.value is not node.inputs[0]:
        return None
    if not is_statistic(view, node.inputs[1], shape, mean.axes):
        return None
    return Mean(mean.value, mean.axes, mean.nodes | reshaping | {node})


def _normalized(root: ir.Node, epsilon: float, variance: _Variance, view: View) -> Fusion | None:
    """From the square root on: d / root * scale + bias."""
    shape = view.shape(variance.x)
    if shape is None or not is_float(variance.x):
        return None
    top, scale, nodes, numerator = root, None, set(variance.nodes), variance.x
    level = root
    for _ in range(_MOST_FACTORS):
        following = reader(level.outputs[0], "Div", "Mul", "Reciprocal")
        if following is None:
            break
        level = following
        numerators = [variance.x] if not variance.centred else _differences(view, variance)
        for candidate in numerators:
            found = product(level.outputs[0], {candidate, root.outputs[0]})
            if found.powers != {candidate: 1, root.outputs[0]: -1} or len(found.arrays) > 1:
                continue
            top, scale, numerator = level, found, candidate
    if scale is None or view.shape(top.outputs[0]) != shape:
        return None
    nodes |= scale.nodes
    if variance.centred:
        centred = _centred(view, numerator)
        assert centred is not None
        nodes |= centred.nodes
    if not is_statistic(view, root.outputs[0], shape, variance.axes):
        return None
    factor = scale.arrays[0].astype(np.float64) if scale.arrays else np.ones((), np.float64)
    added = reader(top.outputs[0], "Add") if variance.centred else None
    shift = None
    if added is not None and view.shape(added.outputs[0]) == shape:
        shift = g.constant_of(added.inputs[1] if added.inputs[0] is top.outputs[0] else added.inputs[0])
    for kind, along in _kinds(variance, shape, view.limit):
        weight = vector_along((factor * scale.constant).astype(np.float32), shape, along)
        bias = vector_along(shift, shape, along) if shift is not None else None
        if weight is None or (shift is not None and bias is None):
            continue
        if added is not None and bias is not None:
            top, nodes = added, nodes | {added}
        found = _Found(kind, variance.x, len(shape), variance.axes, weight, bias, epsilon)
        return Fusion(top, frozenset(nodes), OPSETS[kind], found.build)
    return None


def _kinds(variance: _Variance, shape: tuple[Size, ...], limit: int) -> list[tuple[str, tuple[int, ...]]]:
    """Operators that normalize over these axes, and the axes that their scale varies along; the likelier first."""
    axes, rank = variance.axes, len(shape)
    if not variance.centred:
        return [("RMSNormalization", axes)] if len(axes) == 1 or axes == tuple(range(axes[0], rank)) else []
    kinds = []
    if axes == tuple(range(axes[0], rank)) or len(axes) == 1:
        kinds.append(("LayerNormalization", axes))
    if rank > 2 and axes == tuple(range(2, rank)):
        kinds.insert(0 if rank > 3 else 1, ("InstanceNormalization", (1,)))
    return [(kind, along) for kind, along in kinds if OPSETS[kind] <= limit]


@dataclass(frozen=True)
class _Found:
    """A normalization with all it needs."""

    kind: str
    x: ir.Value
    rank: int
    axes: tuple[int, ...]
    weight: np.ndarray
    bias: np.ndarray | None
    epsilon: float

    def build(self, writer: Writer) -> ir.Value:
        parameters: list[ir.Value | None] = [writer.constant("scale", self.weight)]
        bias = np.zeros_like(self.weight) if self.bias is None and self.kind == "InstanceNormalization" else self.bias
        if bias is not None:
            parameters.append(writer.constant("bias", bias))
        attributes: dict[str, float] = {"epsilon": self.epsilon}
        if self.kind == "InstanceNormalization":
            return writer.node(self.kind, [self.x, *parameters], attributes)
        if self.axes[-1] == self.rank - 1:
            return writer.node(self.kind, [self.x, *parameters], {"axis": self.axes[0] - self.rank, **attributes})
        forth = [axis for axis in range(self.rank) if axis not in self.axes] + [*self.axes]
        moved = writer.node("Transpose", [self.x], {"perm": forth})
        done = writer.node(self.kind, [moved, *parameters], {"axis": -1, **attributes})
        return writer.node("Transpose", [done], {"perm": [forth.index(axis) for axis in range(self.rank)]})


def _differences(view: View, variance: _Variance) -> list[ir.Value]:
    """The values that are x - mean(x): one, or two where the variance has one of its own."""
    found = []
    for usage in variance.x.uses():
        if usage.idx == 0 and usage.node.op_type == "Sub" and len(found) < 2:
            mean = _centred(view, usage.node.outputs[0])
            if mean is not None and mean.axes == variance.axes:
                found.append(usage.node.outputs[0])
    return found
