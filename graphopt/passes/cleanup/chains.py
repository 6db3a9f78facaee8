"""Neighbours that make one node: Transpose of Transpose, Reshape of Reshape, Slice of Slice, and the like.

Each case moves data and computes nothing, so the result is equal bit for bit. The first node of a pair goes away
only when nobody else reads it; where it stays, fusing still shortens the way, but saves no node, and is not done,
except for slices, whose second reader is usually a slice as well.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import onnx_ir as ir

from graphopt import graph as g
from graphopt.passes.cleanup.redundant import slice_operands
from graphopt.shapes.dimensions import Dim
from graphopt.shapes.facts import ShapeFacts

_MOVES_ONLY_SHAPE = ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose")
"""Transpose only where `_keeps_order` holds."""


def fuse_chains(model: ir.Model, facts: ShapeFacts) -> int:
    """Fuse pairs until none is left; returns how many nodes changed."""
    changed = _split_slices(model, facts)
    for node in facts.nodes(_CASES):
        if node.graph is None:
            continue
        if node.inputs and node.inputs[0] is not None and _CASES[node.op_type](model, node, facts):
            changed += 1
    return changed


def _before(node: ir.Node, *op_types: str) -> ir.Node | None:
    """The producer of the first input if it is of one of these types and feeds only `node`, once."""
    value = node.inputs[0]
    producer = value.producer() if value is not None else None
    if producer is None or value is None or not g.is_onnx(producer, *op_types) or len(producer.outputs) != 1:
        return None
    return producer if g.sole_consumer(value) is node and len(value.uses()) == 1 else None


def _bypass(node: ir.Node, producer: ir.Node) -> None:
    node.replace_input_with(0, producer.inputs[0])
    assert producer.graph is not None
    producer.graph.remove(producer, safe=True)


def _keeps_order(node: ir.Node, facts: ShapeFacts) -> bool:
    """True of a node that leaves the elements as they lie in memory: a Transpose that moves only sizes of 1."""
    if node.op_type != "Transpose":
        return True
    shape = facts.shape(node.inputs[0])
    perm = g.attribute(node, "perm", None)
    if shape is None or perm is None:
        return False
    moved = [axis for axis in perm if not (isinstance(shape[axis], int) and shape[axis] == 1)]
    return moved == sorted(moved)


def _reshaping_before(node: ir.Node, facts: ShapeFacts) -> ir.Node | None:
    producer = _before(node, *_MOVES_ONLY_SHAPE)
    return producer if producer is not None and _keeps_order(producer, facts) else None


def _transpose(model: ir.Model, node: ir.Node, facts: ShapeFacts) -> bool:
    """Transpose(Transpose(x, p), q) = Transpose(x, p[q])."""
    producer = _before(node, "Transpose")
    if producer is None:
        return _to_reshape(model, node, facts)
    inner, outer = g.attribute(producer, "perm", None), g.attribute(node, "perm", None)
    if inner is None or outer is None:
        return False
    node.attributes["perm"] = ir.AttrInt64s("perm", [inner[axis] for axis in outer])
    _bypass(node, producer)
    return True


def _reshape(model: ir.Model, node: ir.Node, facts: ShapeFacts) -> bool:
    """Reshape(f(x)) = Reshape(x) for f that only changes the shape; a 0 in the target, which means f's own dimension,
    may become -1. Of f(x) whose own shape a computed target is read off, x may tell it in constants.

    First, a target known in all elements but one becomes a constant with -1 there (or 0 where the element is
    the input's own dimension at that place).
    """
    changed = _constant_target(model, node, facts)
    producer = _reshaping_before(node, facts)
    target = g.integers_of(g.input_of(node, 1))
    if producer is not None and target is None:
        before, after = facts.shape(producer.inputs[0]), facts.shape(node.outputs[0])
        target = None if before is None or after is None else as_target(before, after)
        if target is None:
            return changed
        name = f"{node.outputs[0].name}_shape"
        node.replace_input_with(1, g.add_initializer(model.graph, name, np.array(target, np.int64)))
        node.attributes.pop("allowzero", None)  # a 0 copies now
        _bypass(node, producer)
        return True
    if producer is None or target is None or g.attribute(node, "allowzero", 0):
        return changed
    if 0 in target:
        before, after = facts.shape(producer.inputs[0]), facts.shape(node.inputs[0])
        if before is None or after is None:
            return changed
        others = [
            axis
            for axis, size in enumerate(target)
            if size == 0 and not (axis < min(len(before), len(after)) and before[axis] == after[axis])
        ]
        if others:
            if len(others) > 1 or -1 in target or len(target) > len(after):
                return changed
            target[others[0]] = -1
            name = f"{node.outputs[0].name}_shape"
            node.replace_input_with(1, g.add_initializer(model.graph, name, np.array(target, np.int64)))
    _bypass(node, producer)
    return True


def _constant_target(model: ir.Model, node: ir.Node, facts: ShapeFacts) -> bool:
    value = g.input_of(node, 1)
    wanted = facts.content(value)
    if value is None or wanted is None or value.is_initializer():
        return False
    data = facts.shape(node.inputs[0])
    target: list[int] = []
    for axis, size in enumerate(wanted):
        if isinstance(size, int):
            target.append(size)
        elif data is not None and axis < len(data) and data[axis] == size:
            target.append(0)
        else:
            target.append(-1)
    if target.count(-1) > 1 or any(isinstance(s, int) and s == 0 for s in wanted):
        return False
    if -1 in target and any(isinstance(s, Dim) and min(s.terms.values()) < 0 for s in wanted):
        return False
    constant = g.add_initializer(model.graph, f"{node.outputs[0].name}_shape", np.array(target, dtype=np.int64))
    node.replace_input_with(1, constant)
    node.attributes.pop("allowzero", None)  # a 0 copies now
    return True


def _to_reshape(model: ir.Model, node: ir.Node, facts: ShapeFacts) -> bool:
    """Flatten, Squeeze, Unsqueeze or an order-keeping Transpose of a Reshape, or of one another, is one Reshape."""
    if not _keeps_order(node, facts):
        return False
    producer = _reshaping_before(node, facts)
    data = facts.shape(producer.inputs[0]) if producer is not None else None
    after = facts.shape(node.outputs[0])
    if producer is None or data is None or after is None or g.opset_of(model) < 5:
        return False
    target = as_target(data, after)
    if target is None:
        return False
    constant = g.add_initializer(model.graph, f"{node.outputs[0].name}_shape", np.array(target, dtype=np.int64))
    reshaped = ir.node("Reshape", [producer.inputs[0], constant], name=node.name)
    reshaped.outputs[0].type = node.outputs[0].type
    reshaped.outputs[0].shape = node.outputs[0].shape
    model.graph.insert_before(node, reshaped)
    old, name = node.outputs[0], node.outputs[0].name
    if not g.replace_value(old, reshaped.outputs[0]):
        raise AssertionError("a fresh value can always replace another")
    old.name, reshaped.outputs[0].name = None, name
    model.graph.remove(node, safe=True)
    model.graph.remove(producer, safe=True)
    return True


def as_target(data: tuple, after: tuple) -> list[int] | None:
    """A constant Reshape target that gives `after` from `data`: at most one -1, 0 where a dimension stays put."""
    target = [
        size if isinstance(size, int) else 0 if axis < len(data) and data[axis] == size else -1
        for axis, size in enumerate(after)
    ]
    zero_sized = any(isinstance(size, int) and size == 0 for size in (*after, *data))
    return None if target.count(-1) > 1 or zero_sized else target


def _slice(model: ir.Model, node: ir.Node, facts: ShapeFacts) -> bool:
    """Slice(Slice(x, a), b) = Slice(x, a + b) where the two slice different axes"""
    value = node.inputs[0]
    producer = value.producer() if value is not None else None
    if value is None or producer is None or not g.is_onnx(producer, "Slice") or value.is_graph_output():
        return False
    if not all(g.is_onnx(reader, "Slice") for reader in value.consumers()):
        return False
    inner, outer = _ranges(producer, facts), _ranges(node, facts)
    if inner is None or outer is None or set(inner) & set(outer):
        return False
    joined = {**inner, **outer}
    axes = sorted(joined)
    if g.opset_of(model) < 10:
        node.attributes["starts"] = ir.AttrInt64s("starts", [joined[a][0] for a in axes])
        node.attributes["ends"] = ir.AttrInt64s("ends", [joined[a][1] for a in axes])
        node.attributes["axes"] = ir.AttrInt64s("axes", axes)
        node.replace_input_with(0, producer.inputs[0])
        if not value.uses():
            model.graph.remove(producer, safe=True)
        return True
    columns = (
        [joined[a][0] for a in axes], [joined[a][1] for a in axes], axes, [joined[a][2] for a in axes],
    )  # fmt: skip
    constants = [
        g.add_initializer(model.graph, f"{node.outputs[0].name}_{what}", np.array(column, dtype=np.int64))
        for what, column in zip(("starts", "ends", "axes", "steps"), columns, strict=True)
    ]
    node.resize_inputs(5)
    for position, replacement in enumerate((producer.inputs[0], *constants)):
        node.replace_input_with(position, replacement)
    if not value.uses():
        model.graph.remove(producer, safe=True)
    return True


def _split_slices(model: ir.Model, facts: ShapeFacts) -> int:
    """Two or more slices that cut a value into adjacent pieces along one axis are one Split (opset 2 and later)."""
    by_source: dict[tuple[ir.Value, int], list[tuple[int, int, ir.Node]]] = {}
    for node in facts.nodes(("Slice",)):
        if node.inputs[0] is None:
            continue
        ranges, shape = _ranges(node, facts), facts.shape(node.inputs[0])
        if ranges is None or shape is None or len(ranges) != 1:
            continue
        ((axis, (start, end, step)),) = ranges.items()
        size = shape[axis]
        if step == 1 and isinstance(size, int):
            first, last, _ = slice(start, end).indices(size)
            by_source.setdefault((node.inputs[0], axis), []).append((first, last, node))
    removed = 0
    places: dict[ir.Node, int] = {}
    for (value, axis), pieces in by_source.items():
        shape = facts.shape(value)
        pieces = sorted(pieces, key=lambda piece: piece[0])
        edges = [pieces[0][0], *(piece[1] for piece in pieces)]
        adjacent = all(after[0] == before[1] for before, after in pairwise(pieces))
        if len(pieces) < 2 or shape is None or not adjacent or edges[0] != 0 or edges[-1] != shape[axis]:
            continue
        sizes = [last - first for first, last, _ in pieces]
        if min(sizes) <= 0:
            continue
        places = places or {node: place for place, node in enumerate(model.graph)}
        slices = [node for _, _, node in pieces]
        _as_split(model, value, axis, sizes, slices, min(slices, key=places.__getitem__))
        removed += len(pieces) - 1
    return removed


def _as_split(
    model: ir.Model, value: ir.Value, axis: int, sizes: list[int], slices: list[ir.Node], where: ir.Node
) -> None:
    graph = model.graph
    inputs, attributes = [value], {"axis": axis}
    if g.opset_of(model) >= 13:
        name = f"{slices[0].outputs[0].name}_split"
        inputs.append(g.add_initializer(graph, name, np.array(sizes, dtype=np.int64)))
        split = ir.node("Split", inputs, attributes, num_outputs=len(sizes), name=slices[0].name)
    else:
        split = ir.node("Split", inputs, {**attributes, "split": sizes}, num_outputs=len(sizes), name=slices[0].name)
    graph.insert_before(where, split)
    for node, new in zip(slices, split.outputs, strict=True):
        old, name = node.outputs[0], node.outputs[0].name
        new.shape, new.type = old.shape, old.type
        g.replace_value(old, new)
        old.name, new.name = None, name
        graph.remove(node, safe=True)


def _ranges(node: ir.Node, facts: ShapeFacts) -> dict[int, tuple[int, int, int]] | None:
    """axis -> (start, end, step) of a Slice with constant operands; axes counted from the front."""
    found = slice_operands(node)
    if found is None:
        return None
    starts, ends, axes, steps = found
    if any(a < 0 for a in axes):
        shape = facts.shape(node.inputs[0])
        if shape is None:
            return None
        axes = [a % len(shape) for a in axes]
    return {a: (s, e, t) for a, s, e, t in zip(axes, starts, ends, steps, strict=True)}


def _concat(model: ir.Model, node: ir.Node, facts: ShapeFacts) -> bool:
    """Concat(.., Concat(a, b), ..) = Concat(.., a, b, ..) along one axis."""
    axis = g.attribute(node, "axis", 1)
    inputs: list[ir.Value | None] = []
    gone: list[ir.Node] = []
    for value in node.inputs:
        producer = value.producer() if value is not None else None
        if (
            value is not None
            and producer is not None
            and g.is_onnx(producer, "Concat")
            and g.attribute(producer, "axis", 1) == axis
            and g.sole_consumer(value) is node
            and len(value.uses()) == 1
        ):
            inputs.extend(producer.inputs)
            gone.append(producer)
        else:
            inputs.append(value)
    if not gone:
        return False
    node.resize_inputs(len(inputs))
    for position, value in enumerate(inputs):
        node.replace_input_with(position, value)
    model.graph.remove(gone, safe=True)
    return True


def _clip(model: ir.Model, node: ir.Node, facts: ShapeFacts) -> bool:
    """Clip(Relu(x), low, high) = Clip(x, max(low, 0), high): here for low >= 0 only, where nothing else changes."""
    producer = _before(node, "Relu")
    if producer is None:
        return False
    low = g.attribute(node, "min", None)
    if low is None:
        array = g.constant_of(g.input_of(node, 1))
        low = None if array is None or array.size != 1 else float(array.reshape(())[()])
    if low is None or low < 0:
        return False
    _bypass(node, producer)
    return True


_CASES: dict[str, Callable[[ir.Model, ir.Node, ShapeFacts], bool]] = {
    "Transpose": _transpose,
    "Reshape": _reshape,
    "Flatten": _to_reshape,
    "Squeeze": _to_reshape,
    "Unsqueeze": _to_reshape,
    "Slice": _slice,
    "Concat": _concat,
    "Clip": _clip,
}
