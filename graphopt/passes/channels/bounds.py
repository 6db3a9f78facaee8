"""Between which bounds each channel's elements lie, whatever the inputs: equal bounds make a constant.

Bounds hold for the float32 arithmetic of any engine: a sum of what is not constant is widened by the most that its
rounding can be. Two facts need no widening, and find what is dead in practice: a sum of terms none of which is
positive is not positive, and a product with zero weights is zero (inputs are taken to be finite). What is computed
from constants alone is a constant, known up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from graphopt import graph as g
from graphopt.passes.channels.dependency import ChannelGraph

Bounds = tuple[np.ndarray, np.ndarray]
"""Lower and upper bounds, float64, one of each for each label of a value."""

_MONOTONE: dict[str, Callable[[np.ndarray, ir.Node], np.ndarray]] = {
    "Relu": lambda x, node: np.maximum(x, 0.0),
    "Identity": lambda x, node: x,
    "LeakyRelu": lambda x, node: np.where(x < 0, g.attribute(node, "alpha", 0.01) * x, x),
}
_SAME = ("MaxPool", "GlobalMaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Dropout", "Resize",
         "Upsample", "Expand", "Tile")  # fmt: skip
_AVERAGES = ("AveragePool", "GlobalAveragePool", "ReduceMean")
_RANGES = {"Sigmoid": (0.0, 1.0), "HardSigmoid": (0.0, 1.0), "Softmax": (0.0, 1.0), "Tanh": (-1.0, 1.0)}


def channel_bounds(channels: ChannelGraph) -> dict[ir.Value, Bounds]:
    """Bounds of every value that carries labels, in the order of its labels."""
    found: dict[ir.Value, Bounds] = {}
    for node in channels.model.graph:
        for value in node.outputs:
            carried = channels.carried.get(value)
            if carried is not None:
                count = len(carried.labels)
                low, high = _through(channels, found, node, value, count)
                found[value] = np.where(np.isnan(low), -np.inf, low), np.where(np.isnan(high), np.inf, high)
    return found


def _through(
    channels: ChannelGraph, found: dict[ir.Value, Bounds], node: ir.Node, value: ir.Value, count: int
) -> Bounds:
    anything = np.full(count, -np.inf), np.full(count, np.inf)
    op, data = node.op_type, node.inputs[0]
    known = found.get(data) if data is not None else None
    with np.errstate(all="ignore"):
        if op == "Conv":
            return _convolution(node, known, count)
        if op in ("Gemm", "MatMul"):
            return _product(node, known, anything)
        if op == "BatchNormalization" and known is not None:
            return _normalization(node, known)
        if op in ("Add", "Mul"):
            return _pair(channels, found, node, count)
        if op == "Clip" and known is not None:
            return _clip(channels.opset, node, known)
        if op == "Concat" and channels.carried[value].axis == g.attribute(node, "axis", 0) % _rank(channels, value):
            return _concat(channels, found, node)
        if op in _RANGES:
            return np.full(count, _RANGES[op][0]), np.full(count, _RANGES[op][1])
        if known is None:
            return anything
        if op in _MONOTONE and g.attribute(node, "alpha", 0.01) >= 0:
            return _MONOTONE[op](known[0], node), _MONOTONE[op](known[1], node)
        if op in _SAME and len(known[0]) == count and _plain(node):
            return known
        if op in _AVERAGES:
            return _average(node, known)
    return anything


def _rank(channels: ChannelGraph, value: ir.Value) -> int:
    return len(channels.shape(value) or (0,))


def _plain(node: ir.Node) -> bool:
    """Resizing by other than nearest or linear overshoots."""
    return node.op_type not in ("Resize", "Upsample") or g.attribute(node, "mode", "nearest") == "nearest"


def _sum(weights: np.ndarray, low: np.ndarray, high: np.ndarray, bias: np.ndarray) -> Bounds:
    """Bounds of weights @ x + bias; weights (outputs, terms), x within [low, high] (terms,), bias (outputs,)."""
    least = np.where(weights == 0, 0.0, np.minimum(weights * low, weights * high))
    most = np.where(weights == 0, 0.0, np.maximum(weights * low, weights * high))
    size = np.abs(np.where(weights == 0, 0.0, np.maximum(np.abs(least), np.abs(most)))).sum(axis=1) + np.abs(bias)
    slack = 2.0 * (weights.shape[1] + 2) * np.finfo(np.float32).eps * size
    slack = np.where((least == most).all(axis=1), 0.0, slack)
    above = (most <= 0).all(axis=1) & (bias <= 0)
    below = (least >= 0).all(axis=1) & (bias >= 0)
    bottom, top = least.sum(axis=1) + bias - slack, most.sum(axis=1) + bias + slack
    return np.where(below, np.maximum(bottom, 0.0), bottom), np.where(above, np.minimum(top, 0.0), top)


def _convolution(node: ir.Node, known: Bounds | None, count: int) -> Bounds:
    weights = g.constant_of(node.inputs[1])
    assert weights is not None
    groups, per_group = g.attribute(node, "group", 1), weights.shape[1]
    total = groups * per_group
    low, high = known if known is not None else (np.full(total, -np.inf), np.full(total, np.inf))
    if any(g.attribute(node, "pads", ())) or g.attribute(node, "auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        low, high = np.minimum(low, 0.0), np.maximum(high, 0.0)
    bias = g.constant_of(g.input_of(node, 2))
    shift = np.zeros(count) if bias is None else bias.astype(np.float64)
    matrix = weights.astype(np.float64).reshape(groups, count // groups, -1)
    taps = matrix.shape[2] // per_group
    parts = [
        _sum(
            matrix[group],
            np.repeat(low[group * per_group :][:per_group], taps),
            np.repeat(high[group * per_group :][:per_group], taps),
            shift.reshape(groups, -1)[group],
        )
        for group in range(groups)
    ]
    return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])


def _product(node: ir.Node, known: Bounds | None, anything: Bounds) -> Bounds:
    weights = g.constant_of(node.inputs[1])
    plain = g.attribute(node, "alpha", 1.0) == 1.0 and g.attribute(node, "beta", 1.0) == 1.0
    if weights is None or not plain or g.attribute(node, "transA", 0) or weights.ndim != 2:
        return anything
    matrix = weights.astype(np.float64) if g.attribute(node, "transB", 0) else weights.astype(np.float64).T
    bias = g.constant_of(g.input_of(node, 2))
    if len(matrix) != len(anything[0]) or (bias is not None and bias.ndim == 2 and bias.shape[0] != 1):
        return anything
    shift = np.zeros(len(matrix)) if bias is None else np.broadcast_to(bias.reshape(-1), (len(matrix),))
    low, high = known if known is not None else (np.full(matrix.shape[1], -np.inf), np.full(matrix.shape[1], np.inf))
    return _sum(matrix, low, high, shift.astype(np.float64))


def _normalization(node: ir.Node, known: Bounds) -> Bounds:
    arrays = [g.constant_of(value) for value in node.inputs[1:5]]
    if any(a is None for a in arrays):
        return np.full_like(known[0], -np.inf), np.full_like(known[1], np.inf)
    scale, shift, mean, variance = (np.asarray(a, np.float64) for a in arrays)
    factor = scale / np.sqrt(variance + g.attribute(node, "epsilon", 1e-5))
    one, other = (np.where(factor == 0, 0.0, (end - mean) * factor) for end in known)
    low, high = np.minimum(one, other), np.maximum(one, other)
    size = np.maximum(np.abs(low), np.abs(high)) + np.abs(mean * factor) + np.abs(shift)
    slack = np.where(low == high, 0.0, 8.0 * np.finfo(np.float32).eps * size)
    return low + shift - slack, high + shift + slack


def _pair(channels: ChannelGraph, found: dict[ir.Value, Bounds], node: ir.Node, count: int) -> Bounds:
    sides = [_operand(channels, found, value, node, count) for value in node.inputs]
    (a, b), (c, d) = sides
    if node.op_type == "Add":
        low, high = a + c, b + d
    else:
        corners = np.stack([np.where((x == 0) | (y == 0), 0.0, x * y) for x in (a, b) for y in (c, d)])
        low, high = corners.min(axis=0), corners.max(axis=0)
    # rounding to nearest keeps the order: bounds rounded outwards hold
    unit = np.finfo(np.float32).eps
    exact = low == high
    return np.where(exact, low, low - unit * np.abs(low)), np.where(exact, high, high + unit * np.abs(high))


def _operand(
    channels: ChannelGraph, found: dict[ir.Value, Bounds], value: ir.Value | None, node: ir.Node, count: int
) -> Bounds:
    if value is not None and value in found and len(found[value][0]) == count:
        return found[value]
    array, carried = g.constant_of(value), channels.carried[node.outputs[0]]
    axis = carried.axis - _rank(channels, node.outputs[0])
    if array is None or array.dtype.kind != "f":
        return np.full(count, -np.inf), np.full(count, np.inf)
    if array.ndim >= -axis:
        rows = np.moveaxis(array, axis, 0).reshape(array.shape[axis], -1).astype(np.float64)
    else:
        rows = array.reshape(1, -1).astype(np.float64)
    return np.broadcast_to(rows.min(axis=1), (count,)), np.broadcast_to(rows.max(axis=1), (count,))


def _clip(opset: int, node: ir.Node, known: Bounds) -> Bounds:
    limits = []
    for index, name in ((1, "min"), (2, "max")):
        value = g.input_of(node, index) if opset >= 11 else None
        array = g.constant_of(value)
        given = g.attribute(node, name, None) if opset < 11 else None
        if value is not None and array is None:
            return np.full_like(known[0], -np.inf), np.full_like(known[1], np.inf)
        limits.append(float(array.reshape(())) if array is not None else given)
    low = -np.inf if limits[0] is None else limits[0]
    high = np.inf if limits[1] is None else limits[1]
    return np.minimum(np.maximum(known[0], low), high), np.minimum(np.maximum(known[1], low), high)


def _concat(channels: ChannelGraph, found: dict[ir.Value, Bounds], node: ir.Node) -> Bounds:
    parts = []
    for value in node.inputs:
        shape = channels.shape(value)
        axis = channels.carried[node.outputs[0]].axis
        size = shape[axis] if shape is not None else None
        if value is not None and value in found:
            parts.append(found[value])
        else:
            assert isinstance(size, int)
            parts.append((np.full(size, -np.inf), np.full(size, np.inf)))
    return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])


def _average(node: ir.Node, known: Bounds) -> Bounds:
    """A constant, or no more than the sign. Padding may count as zeros."""
    padded = any(g.attribute(node, "pads", ())) or g.attribute(node, "auto_pad", "NOTSET") not in ("NOTSET", "VALID")
    constant = (known[0] == known[1]) & ((known[0] == 0) | (not padded and not g.attribute(node, "ceil_mode", 0)))
    low = np.where(known[0] >= 0, 0.0, -np.inf)
    high = np.where(known[1] <= 0, 0.0, np.inf)
    return np.where(constant, known[0], low), np.where(constant, known[1], high)
