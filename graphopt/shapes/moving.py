"""Nodes that only move elements, evaluated by numpy: the same bits as any kernel, without opening a session for each.

Operands that a runtime would refuse are left to it, and so are the rarer forms.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from graphopt import graph as g

Operands = Sequence[np.ndarray | None]


def moved(node: ir.Node, operands: Operands, opset: int) -> np.ndarray | None:
    """The only output of `node`; None where another has to compute it."""
    step = _STEPS.get(node.op_type)
    if step is None or len(node.outputs) != 1 or not operands or operands[0] is None:
        return None
    try:
        found = step(node, operands, opset)
    except (IndexError, ValueError, TypeError, np.exceptions.AxisError):
        return None  # an invalid node: the runtime says so
    return None if found is None else np.ascontiguousarray(found).reshape(found.shape)


def _identity(node: ir.Node, operands: Operands, opset: int) -> np.ndarray | None:
    return operands[0]


def _reshape(node: ir.Node, operands: Operands, opset: int) -> np.ndarray | None:
    data, target = operands[0], operands[1] if len(operands) > 1 else None
    if data is None or target is None or target.ndim != 1 or g.attribute(node, "allowzero", 0):
        return None
    return data.reshape([data.shape[axis] if size == 0 else int(size) for axis, size in enumerate(target)])


def _axes(node: ir.Node, operands: Operands, opset: int) -> list[int] | None:
    if opset < 13:
        found = g.attribute(node, "axes", None)
        return None if found is None else [int(axis) for axis in found]
    given = operands[1] if len(operands) > 1 else None
    return None if given is None else [int(axis) for axis in given.reshape(-1)]


def _squeeze(node: ir.Node, operands: Operands, opset: int) -> np.ndarray | None:
    data, axes = operands[0], _axes(node, operands, opset)
    return None if data is None else data.squeeze() if axes is None else data.squeeze(tuple(axes))


def _unsqueeze(node: ir.Node, operands: Operands, opset: int) -> np.ndarray | None:
    data, axes = operands[0], _axes(node, operands, opset)
    return None if data is None or axes is None else np.expand_dims(data, tuple(axes))


def _flatten(node: ir.Node, operands: Operands, opset: int) -> np.ndarray | None:
    data, axis = operands[0], g.attribute(node, "axis", 1)
    if data is None or not 0 <= axis <= data.ndim or data.size == 0:
        return None
    return data.reshape(int(np.prod(data.shape[:axis], dtype=np.int64)), -1)


def _transpose(node: ir.Node, operands: Operands, opset: int) -> np.ndarray | None:
    data = operands[0]
    return None if data is None else data.transpose(g.attribute(node, "perm", None))


def _concat(node: ir.Node, operands: Operands, opset: int) -> np.ndarray | None:
    parts = [part for part in operands if part is not None]
    axis = g.attribute(node, "axis", None)
    if axis is None or len(parts) != len(operands) or len({part.dtype for part in parts}) != 1:
        return None
    return np.concatenate(parts, axis=axis)


def _slice(node: ir.Node, operands: Operands, opset: int) -> np.ndarray | None:
    data = operands[0]
    if opset < 10 or data is None:
        return None
    starts, ends, axes, steps = (*operands[1:], None, None, None)[:4]
    if starts is None or ends is None:
        return None
    places = range(len(starts)) if axes is None else axes
    strides = [1] * len(starts) if steps is None else steps
    cuts = [slice(None)] * data.ndim
    for axis, start, end, step in zip(places, starts, ends, strides, strict=True):
        if step <= 0:
            return None
        cuts[axis] = slice(int(start), int(end), int(step))
    return data[tuple(cuts)]


def _gather(node: ir.Node, operands: Operands, opset: int) -> np.ndarray | None:
    data, indices = operands[0], operands[1]
    if data is None or indices is None:
        return None
    return np.asarray(np.take(data, indices, axis=g.attribute(node, "axis", 0)))  # raises outside of the data


def _shape(node: ir.Node, operands: Operands, opset: int) -> np.ndarray | None:
    data = operands[0]
    if data is None:
        return None
    return np.array(data.shape[slice(g.attribute(node, "start", None), g.attribute(node, "end", None))], np.int64)


_STEPS: dict[str, Callable[[ir.Node, Operands, int], np.ndarray | None]] = {
    "Identity": _identity,
    "Reshape": _reshape,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Flatten": _flatten,
    "Transpose": _transpose,
    "Concat": _concat,
    "Slice": _slice,
    "Gather": _gather,
    "Shape": _shape,
}
