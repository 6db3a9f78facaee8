"""Nodes that change nothing: `reduces_to(node, facts)` names the input that a node's only output equals.

Every case holds for every input bit for bit, with two exceptions that are taken: x + 0 turns -0.0 into +0.0, which
its removal does not, and Relu of Sigmoid and the like may turn a NaN that came in into 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from graphopt import graph as g
from graphopt.shapes.dimensions import Dim
from graphopt.shapes.facts import ShapeFacts

_FAR = 2**31 - 1
"""Exporters write INT_MAX, or INT64_MAX, for "to the end"."""
_ADDRESSABLE = 2**47
"""Bytes that no process can address: an axis that would make a tensor of so many is shorter than that."""


def drop_redundant(model: ir.Model, facts: ShapeFacts) -> int:
    """Bypass and remove nodes that reduce to one of their inputs; returns how many went."""
    dropped = []
    for node in facts.nodes(_CASES):
        if len(node.outputs) > 1 and any(v.uses() or v.is_graph_output() for v in node.outputs[1:]):
            continue
        same = reduces_to(node, facts)
        if same is not None and g.replace_value(node.outputs[0], same):
            dropped.append(node)
    model.graph.remove(dropped, safe=True)
    return len(dropped)


def reduces_to(node: ir.Node, facts: ShapeFacts) -> ir.Value | None:
    """The input that the first output of `node` always equals; None when there is none."""
    case = _CASES.get(node.op_type)
    return None if case is None or not node.inputs or node.inputs[0] is None else case(node, facts)


def _identity(node: ir.Node, facts: ShapeFacts) -> ir.Value | None:
    return node.inputs[0]


def _dropout(node: ir.Node, facts: ShapeFacts) -> ir.Value | None:
    """Inference: opset 12 and later unless training_mode is given, 7 to 11 always, 1 and 6 with is_test."""
    training = g.input_of(node, 2)
    if training is not None:
        flag = g.constant_of(training)
        if flag is None or bool(flag):
            return None
    version = node.graph.opset_imports.get("", 0) if isinstance(node.graph, ir.Graph) else 0
    return node.inputs[0] if version >= 7 or g.attribute(node, "is_test", 0) else None


def _cast(node: ir.Node, facts: ShapeFacts) -> ir.Value | None:
    value = node.inputs[0]
    assert value is not None
    return value if value.dtype is not None and value.dtype == g.attribute(node, "to", None) else None


def _same_shape(node: ir.Node, facts: ShapeFacts) -> ir.Value | None:
    """Reshape, Flatten, Squeeze, Unsqueeze, Expand and Tile whose result has the shape of their input."""
    before, after = facts.shape(node.inputs[0]), facts.shape(node.outputs[0])
    if before is None:
        return None
    if node.op_type in ("Reshape", "Expand"):
        return node.inputs[0] if _reaches_only(node, facts) else None
    if node.op_type == "Flatten" and after is None:
        return node.inputs[0] if len(before) == 2 and g.attribute(node, "axis", 1) in (1, -1) else None
    return node.inputs[0] if after == before else None


def _reaches_only(node: ir.Node, facts: ShapeFacts) -> bool:
    """Whether the target of a Reshape or Expand asks for the shape that is there already."""
    before, target = facts.shape(node.inputs[0]), facts.content(g.input_of(node, 1))
    if before is None or target is None:
        return False
    wanted = list(target)
    if node.op_type == "Expand":
        padded = [1] * (len(before) - len(wanted)) + wanted
        return len(wanted) <= len(before) and all(
            w == b or (isinstance(w, int) and w == 1) for w, b in zip(padded, before, strict=True)
        )
    if len(wanted) != len(before):
        return False
    copies = not g.attribute(node, "allowzero", 0)
    open_axes = 0
    for want, have in zip(wanted, before, strict=True):
        if isinstance(want, int) and want == -1:
            open_axes += 1
        elif not (want == have or (copies and isinstance(want, int) and want == 0)):
            return False
    return open_axes <= 1


def _tile(node: ir.Node, facts: ShapeFacts) -> ir.Value | None:
    repeats = g.integers_of(g.input_of(node, 1))
    return node.inputs[0] if repeats is not None and all(r == 1 for r in repeats) else None


def _transpose(node: ir.Node, facts: ShapeFacts) -> ir.Value | None:
    perm = g.attribute(node, "perm", None)
    if perm is None:
        dims = g.dims_of(node.inputs[0])
        return node.inputs[0] if dims is not None and len(dims) <= 1 else None
    return node.inputs[0] if list(perm) == sorted(perm) else None


def _pad(node: ir.Node, facts: ShapeFacts) -> ir.Value | None:
    pads = g.attribute(node, "pads", None)
    pads = list(pads) if pads is not None else g.integers_of(g.input_of(node, 1))
    return node.inputs[0] if pads is not None and all(p == 0 for p in pads) else None


def slice_operands(node: ir.Node) -> tuple[list[int], list[int], list[int], list[int]] | None:
    """Starts, ends, axes and steps of a Slice, as attributes (before opset 10) or constants; None if computed."""
    if "starts" in node.attributes:
        starts: list[int] = [*g.attribute(node, "starts", ())]
        ends: list[int] = [*g.attribute(node, "ends", ())]
        return starts, ends, [*g.attribute(node, "axes", range(len(starts)))], [1] * len(starts)
    first, last = g.integers_of(g.input_of(node, 1)), g.integers_of(g.input_of(node, 2))
    if first is None or last is None:
        return None
    axes = list(range(len(first))) if g.input_of(node, 3) is None else g.integers_of(node.inputs[3])
    steps = [1] * len(first) if g.input_of(node, 4) is None else g.integers_of(node.inputs[4])
    return None if axes is None or steps is None else (first, last, axes, steps)


def _slice(node: ir.Node, facts: ShapeFacts) -> ir.Value | None:
    operands = slice_operands(node)
    if operands is None or any(s != 0 for s in operands[0]) or any(s != 1 for s in operands[3]):
        return None
    _, ends, axes, _ = operands
    shape = facts.shape(node.inputs[0])
    dtype = node.inputs[0].dtype if node.inputs[0] is not None else None
    row = math.prod(size for size in shape or () if isinstance(size, int)) * (1 if dtype is None else dtype.itemsize)
    for end, axis in zip(ends, axes, strict=True):
        size = shape[axis] if shape is not None and -len(shape) <= axis < len(shape) else None
        whole = end >= size if isinstance(size, int) else end >= _FAR or end * row >= _ADDRESSABLE
        if not whole:
            return None
    return node.inputs[0]


def _only_piece(node: ir.Node, facts: ShapeFacts) -> ir.Value | None:
    """Concat, Sum, Max, Min and Mean of one, Split into one."""
    if node.op_type == "Split":
        return node.inputs[0] if len(node.outputs) == 1 else None
    return node.inputs[0] if len(node.inputs) == 1 else None


def _neutral(element: float, either_side: bool) -> Callable[[ir.Node, ShapeFacts], ir.Value | None]:
    def case(node: ir.Node, facts: ShapeFacts) -> ir.Value | None:
        if len(node.inputs) != 2:
            return None
        for kept, other in ((0, 1), (1, 0)) if either_side else ((0, 1),):
            value, constant = node.inputs[kept], facts.constant(node.inputs[other])
            if value is None or constant is None or constant.size == 0 or constant.flat[0] != element:
                continue
            if not np.all(constant == element):
                continue
            shape = facts.shape(value)
            if shape is None or len(shape) < constant.ndim:
                continue
            tail = shape[len(shape) - constant.ndim :]
            if all(c == 1 or (not isinstance(d, Dim) and d == c) for c, d in zip(constant.shape, tail, strict=True)):
                return value  # the constant does not broadcast the value to a larger shape
        return None

    return case


def _idempotent(node: ir.Node, facts: ShapeFacts) -> ir.Value | None:
    """f(f(x)) = f(x) for Relu, Abs, Ceil, Floor, Round, Sign; Relu after what is never negative.

    Sqrt is not among the latter: it makes NaN of negative numbers, of which runtimes' Relu may make 0.
    """
    value = node.inputs[0]
    producer = value.producer() if value is not None else None
    if producer is None or not g.is_onnx(producer):
        return None
    if producer.op_type == node.op_type:
        return value
    if node.op_type == "Relu":
        if producer.op_type in ("Sigmoid", "HardSigmoid", "Softmax", "Abs", "Exp", "Softplus"):
            return value
        if producer.op_type == "Clip":
            low = g.attribute(producer, "min", None)
            if low is None:
                array = g.constant_of(g.input_of(producer, 1))
                low = None if array is None or array.size != 1 else float(array.reshape(())[()])
            return value if low is not None and low >= 0 else None
    return None


_CASES: dict[str, Callable[[ir.Node, ShapeFacts], ir.Value | None]] = {
    "Identity": _identity,
    "Dropout": _dropout,
    "Cast": _cast,
    "Reshape": _same_shape,
    "Flatten": _same_shape,
    "Expand": _same_shape,
    "Tile": _tile,
    "Transpose": _transpose,
    "Pad": _pad,
    "Slice": _slice,
    "Concat": _only_piece,
    "Sum": _only_piece,
    "Max": _only_piece,
    "Min": _only_piece,
    "Mean": _only_piece,
    "Split": _only_piece,
    "Add": _neutral(0.0, either_side=True),
    "Sub": _neutral(0.0, either_side=False),
    "Mul": _neutral(1.0, either_side=True),
    "Div": _neutral(1.0, either_side=False),
    "And": _neutral(True, either_side=True),
    "Or": _neutral(False, either_side=True),
    "Relu": _idempotent,
    "Abs": _idempotent,
    "Ceil": _idempotent,
    "Floor": _idempotent,
    "Round": _idempotent,
    "Sign": _idempotent,
}
