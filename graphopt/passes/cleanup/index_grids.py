"""Elements gathered one by one, all in the order in which they lie.

    GatherND(x, Concat(i, j))  =  Reshape(x)        i and j: 0, 1, 2 ... along two axes of the indices, repeated or not

Applies when the parts of the indices are Range(0, n, 1), moved to one axis each and repeated along others, in the order
of the axes of x, whose sizes they have; and the axes of the indices that none of them runs along have size 1.
Where it comes from: PyTorch's vmap, with which Transformers builds attention masks.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphopt import graph as g
from graphopt.passes.cleanup.chains import as_target
from graphopt.shapes.facts import Shape, ShapeFacts


def drop_index_grids(model: ir.Model, facts: ShapeFacts) -> int:
    """Write a Reshape for every such GatherND of the main graph; returns how many."""
    found = 0
    for node in list(model.graph):
        if g.is_onnx(node, "GatherND") and not g.attribute(node, "batch_dims", 0):
            found += _rewritten(model, node, facts)
    return found


def _rewritten(model: ir.Model, node: ir.Node, facts: ShapeFacts) -> bool:
    data, grid = facts.shape(node.inputs[0]), facts.shape(node.inputs[1])
    joined = node.inputs[1].producer() if node.inputs[1] is not None else None
    if data is None or grid is None or joined is None or not g.is_onnx(joined, "Concat"):
        return False
    if g.attribute(joined, "axis", 0) not in (-1, len(grid) - 1) or len(joined.inputs) != len(data):
        return False
    after = grid[:-1]
    axes = []
    for value, size in zip(joined.inputs, data, strict=True):
        shape, axis = facts.shape(value), _ramp(value, facts)
        if shape is None or axis is None or shape != (*after, 1) or axis == len(after) or after[axis] != size:
            return False
        axes.append(axis)
    if axes != sorted(set(axes)) or any(size != 1 for axis, size in enumerate(after) if axis not in axes):
        return False
    target = as_target(data, after)
    if target is None:
        return False
    constant = g.add_initializer(model.graph, f"{node.outputs[0].name}_shape", np.array(target, np.int64))
    made = ir.node("Reshape", [node.inputs[0], constant], name=node.name)
    model.graph.insert_before(node, made)
    old, new = node.outputs[0], made.outputs[0]
    name, new.type, new.shape = old.name, old.type, old.shape
    if not g.replace_value(old, new):
        raise AssertionError("a fresh value can always replace another")
    old.name, new.name = None, name
    model.graph.remove(node, safe=True)
    return True


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
