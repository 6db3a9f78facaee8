"""Shape arithmetic: what operators make of short integer vectors, whose elements are integers and dimensions.

A step takes (node, contents of its inputs, opset) and gives the content of its result, an object array of integers and
`Dim`s with at most one axis; None where it cannot tell. Truth values are 0 and 1. IndexError, ValueError, TypeError: an
invalid or unusual node.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from graphopt import graph as g
from graphopt.shapes.dimensions import Dim, Size, are_equal, truncate_divide


def objects(elements) -> np.ndarray:
    """An object array of integers and dimensions."""
    array = np.empty(np.shape(elements), dtype=object)
    flat = [e if isinstance(e, Dim) else int(e) for e in np.asarray(elements, dtype=object).reshape(-1)]
    for k, element in enumerate(flat):
        array.reshape(-1)[k] = element
    return array


def scalar(element: Size) -> np.ndarray:
    """An object array without axes."""
    array = np.empty((), dtype=object)
    array[()] = element
    return array


def _axes(node: ir.Node, operands: list, opset: int) -> list[int] | None:
    if opset >= 13:
        axes = operands[1] if len(operands) > 1 else None
        return None if axes is None else [int(a) for a in np.atleast_1d(axes)]
    axes = g.attribute(node, "axes", None)
    return None if axes is None else [int(a) for a in axes]


def _unsqueeze(node: ir.Node, operands: list, opset: int) -> np.ndarray | None:
    return operands[0].reshape(1) if operands[0].ndim == 0 and _axes(node, operands, opset) in ([0], [-1]) else None


def _squeeze(node: ir.Node, operands: list, opset: int) -> np.ndarray | None:
    if operands[0].ndim == 0 or _axes(node, operands, opset) not in (None, [0], [-1]):
        return operands[0] if operands[0].ndim == 0 else None
    return operands[0].reshape(()) if operands[0].size == 1 else operands[0]


def _gather(node: ir.Node, operands: list, opset: int) -> np.ndarray | None:
    data, indices = operands
    if data.ndim != 1 or any(isinstance(i, Dim) for i in indices.reshape(-1)):
        return None
    picked = data[indices.astype(np.int64)]
    return picked if isinstance(picked, np.ndarray) else scalar(picked)


def _slice(node: ir.Node, operands: list, opset: int) -> np.ndarray | None:
    if opset >= 10:
        starts, ends = operands[1], operands[2]
        axes = operands[3] if len(operands) > 3 else None
        steps = operands[4] if len(operands) > 4 else None
    else:
        starts, ends = objects(g.attribute(node, "starts", ())), objects(g.attribute(node, "ends", ()))
        axes, steps = None, None
    step = 1 if steps is None else steps.reshape(-1)[0]
    if operands[0].ndim != 1 or starts.size != 1 or any(isinstance(x, Dim) for x in (starts[0], ends[0], step)):
        return None
    if axes is not None and int(axes[0]) not in (0, -1):
        return None
    return operands[0][slice(starts[0], ends[0], step)] if step > 0 else None


def _concatenate(node: ir.Node, operands: list, opset: int) -> np.ndarray | None:
    return np.concatenate(operands) if all(o is not None and o.ndim == 1 for o in operands) else None


def _flatten_vector(node: ir.Node, operands: list, opset: int) -> np.ndarray | None:
    target = list(operands[1].reshape(-1))
    if target in ([-1], [operands[0].size]):
        return operands[0].reshape(-1)
    return operands[0].reshape(()) if not target and operands[0].size == 1 else None


def _reduce_product(node: ir.Node, operands: list, opset: int) -> np.ndarray | None:
    if operands[0].ndim != 1 or (len(operands) > 1 and operands[1] is not None and [*operands[1]] not in ([0], [-1])):
        return None
    total: Size = 1
    for element in operands[0]:
        total = element * total
    return objects([total]) if g.attribute(node, "keepdims", 1) else scalar(total)


def _elementwise(operation: Callable[[Size, Size], Size | None]):
    def step(node: ir.Node, operands: list, opset: int) -> np.ndarray | None:
        left, right = np.broadcast_arrays(operands[0], operands[1])
        results = [operation(a, b) for a, b in zip(left.reshape(-1), right.reshape(-1), strict=True)]
        if any(r is None for r in results):
            return None
        return objects(results).reshape(left.shape) if left.ndim else scalar(results[0])  # type: ignore[arg-type]

    return step


def _equal(left: Size, right: Size) -> int | None:
    same = are_equal(left, right)
    return None if same is None else int(same)


def _where(node: ir.Node, operands: list, opset: int) -> np.ndarray | None:
    """Where(Equal(target, -1), ones, target) is how PyTorch makes a target for Expand."""
    condition, *branches = np.broadcast_arrays(*operands)
    if any(isinstance(c, Dim) for c in condition.reshape(-1)):
        return None
    columns = zip(condition.reshape(-1), *(b.reshape(-1) for b in branches), strict=True)
    chosen = [yes if c else no for c, yes, no in columns]
    return objects(chosen) if condition.ndim else scalar(chosen[0])


def _same(node: ir.Node, operands: list, opset: int) -> np.ndarray | None:
    return operands[0]


STEPS: dict[str, Callable[..., np.ndarray | None]] = {
    "Add": _elementwise(lambda a, b: a + b),
    "Sub": _elementwise(lambda a, b: a - b),
    "Mul": _elementwise(lambda a, b: a * b),
    "Div": _elementwise(truncate_divide),
    "Equal": _elementwise(_equal),
    "Where": _where,
    "Cast": _same,
    "Identity": _same,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Gather": _gather,
    "Slice": _slice,
    "Concat": _concatenate,
    "Reshape": _flatten_vector,
    "ReduceProd": _reduce_product,
}
