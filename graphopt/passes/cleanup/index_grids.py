"""Elements gathered one by one, all in the order in which they lie.

    GatherND(x, Concat(i, j))      =  Reshape(x)     i and j: 0, 1, 2 ... along two axes of the indices, repeated or not
    Gather(Flatten(x), i * n + j)  =  Reshape(x)     n: how many j there are

Cases:

1. GatherND: the parts of the indices are Range(0, n, 1), moved to one axis each and repeated along others, in the order
   of the axes of x, whose sizes they have.
2. Gather along the first axis: the index is a sum of such ranges, each times the sizes of all behind it, or once; as
   many as that axis has elements.

The axes of the indices that none of the ranges runs along have size 1.
Where it comes from: PyTorch's vmap, with which Transformers builds attention masks; the second case from the exporter
that traces.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphopt import graph as g
from graphopt.passes.cleanup.chains import as_target
from graphopt.shapes.dimensions import Size
from graphopt.shapes.facts import Shape, ShapeFacts


def drop_index_grids(model: ir.Model, facts: ShapeFacts) -> int:
    """Write a Reshape for every such GatherND and Gather of the main graph; returns how many."""
    found = 0
    for node in facts.nodes(("GatherND", "Gather")):
        after = _all_in_order(node, facts) if node.op_type == "GatherND" else _all_in_sum(node, facts)
        found += after is not None and _rewritten(model, node, after, facts)
    return found


def _rewritten(model: ir.Model, node: ir.Node, after: Shape, facts: ShapeFacts) -> bool:
    found = _source(node.inputs[0], after, facts)
    if found is None:
        return False
    source, target = found
    constant = g.add_initializer(model.graph, f"{node.outputs[0].name}_shape", np.array(target, np.int64))
    made = ir.node("Reshape", [source, constant], name=node.name)
    model.graph.insert_before(node, made)
    old, new = node.outputs[0], made.outputs[0]
    name, new.type, new.shape = old.name, old.type, old.shape
    if not g.replace_value(old, new):
        raise AssertionError("a fresh value can always replace another")
    old.name, new.name = None, name
    model.graph.remove(node, safe=True)
    return True


def _source(value: ir.Value | None, after: Shape, facts: ShapeFacts) -> tuple[ir.Value, list[int]] | None:
    """What `value` is a reshaped form of, or itself, and the constant target that makes `after` of it."""
    while value is not None:
        data = facts.shape(value)
        target = None if data is None else as_target(data, after)
        if target is not None:
            return value, target
        node = value.producer()
        if node is None or not g.is_onnx(node, "Reshape", "Flatten", "Squeeze", "Unsqueeze"):
            return None
        value = node.inputs[0]
    return None


def _all_in_order(node: ir.Node, facts: ShapeFacts) -> Shape | None:
    """The shape that a GatherND of all elements in their order makes; None of another."""
    data, grid = facts.shape(node.inputs[0]), facts.shape(node.inputs[1])
    joined = node.inputs[1].producer() if node.inputs[1] is not None else None
    if data is None or grid is None or joined is None or not g.is_onnx(joined, "Concat"):
        return None
    if g.attribute(node, "batch_dims", 0) or len(joined.inputs) != len(data):
        return None
    if g.attribute(joined, "axis", 0) not in (-1, len(grid) - 1):
        return None
    after = grid[:-1]
    axes = []
    for value, size in zip(joined.inputs, data, strict=True):
        shape, axis = facts.shape(value), _ramp(value, facts)
        if shape is None or axis is None or shape != (*after, 1) or axis == len(after) or after[axis] != size:
            return None
        axes.append(axis)
    return after if axes == sorted(set(axes)) and _covers(after, axes) else None


def _all_in_sum(node: ir.Node, facts: ShapeFacts) -> Shape | None:
    """The shape that a Gather of all rows in their order makes; None of another."""
    data, index = facts.shape(node.inputs[0]), facts.shape(node.inputs[1])
    if data is None or index is None or not data or g.attribute(node, "axis", 0) not in (0, -len(data)):
        return None
    terms = _terms(node.inputs[1], facts, len(index))
    if terms is None or not _covers(index, [axis for axis, _, _ in terms]):
        return None
    stride: Size = 1
    for axis, size, factor in sorted(terms, key=lambda term: -term[0]):
        if index[axis] != size or factor != stride:  # of two along one axis, the second would need another factor
            return None
        stride = size * stride
    return (*index, *data[1:]) if stride == data[0] else None


def _terms(value: ir.Value | None, facts: ShapeFacts, rank: int) -> list[tuple[int, Size, Size]] | None:
    """The ranges that a sum of them consists of: (axis of `rank`, how many numbers, factor)."""
    shape, axis = facts.shape(value), _ramp(value, facts)
    if shape is not None and axis is not None:
        return [(axis + rank - len(shape), shape[axis], 1)]
    node = None if value is None else value.producer()
    if node is None or not g.is_onnx(node, "Add", "Mul"):
        return None
    parts = [_terms(v, facts, rank) for v in node.inputs]
    if node.op_type == "Add":
        return None if parts[0] is None or parts[1] is None else parts[0] + parts[1]
    for part, other in zip(parts, node.inputs[::-1], strict=True):
        factor = facts.content(other)
        if part is not None and factor is not None and factor.size == 1:
            return [(axis, size, each * factor.reshape(-1)[0]) for axis, size, each in part]
    return None


def _covers(after: Shape, axes: list[int]) -> bool:
    """Whether all axes but these have size 1."""
    return all(size == 1 for axis, size in enumerate(after) if axis not in axes)


def _ramp(value: ir.Value | None, facts: ShapeFacts) -> int | None:
    """The axis along which a value is 0, 1, 2 ..., alike along all others; None where it is something else."""
    node, shape = None if value is None else value.producer(), facts.shape(value)
    if node is None or shape is None or not g.is_onnx(node):
        return None
    if node.op_type == "Range":
        bounds = [facts.content(v) for v in node.inputs]
        start, step = (None if b is None or b.ndim else b[()] for b in (bounds[0], bounds[2]))
        return 0 if start == 0 and step == 1 else None
    if node.op_type not in ("Expand", "Reshape", "Squeeze", "Unsqueeze"):
        return None
    before, axis = facts.shape(node.inputs[0]), _ramp(node.inputs[0], facts)
    if before is None or axis is None:
        return None
    if node.op_type == "Expand":
        place = axis + len(shape) - len(before)
        return place if shape[place] == before[axis] else None
    return _kept(before, axis, shape)


def _kept(before: Shape, axis: int, after: Shape) -> int | None:
    """Where an axis goes if axes of size 1 come and go, and no others."""
    old = [place for place, size in enumerate(before) if size != 1]
    new = [place for place, size in enumerate(after) if size != 1]
    if axis not in old or [before[place] for place in old] != [after[place] for place in new]:
        return None
    return new[old.index(axis)]
