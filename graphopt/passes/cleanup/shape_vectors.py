"""Shape vectors joined from what is there anyway.

    Concat(Shape(Transpose(x))[:2], 16)  =  Concat(Shape(input)[0:1], [4, 16])

A longer piece of a Concat is replaced by its elements, where each is a number or a dimension that a vector of one
holds already; one dimension may be read off an input of the model instead of the piece. The graph never grows; and
tensors that were only read for their shape may be fused.

    Unsqueeze(Gather(Shape(x), 1))  =  Shape(x)[1:2]          Gather(Shape(x), 1)  =  Squeeze(Shape(x)[1:2])

The second only beside the first, where the number is read as well. From opset 15 on.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphopt import graph as g
from graphopt.shapes.dimensions import Dim, Size
from graphopt.shapes.facts import ShapeFacts

_SHAPE_WITH_BOUNDS = 15
"""The opset that gave Shape a start and an end."""


def spell_vectors(model: ir.Model, facts: ShapeFacts) -> int:
    """Rewrite the Concats of shape vectors in the main graph; returns how many were."""
    singles: dict[Size, ir.Value] = {}
    rewritten = 0
    for value, content in facts.vectors():
        node = value.producer()
        if node is None or node.graph is not model.graph or value.dtype != ir.DataType.INT64 or content.ndim != 1:
            continue
        if len(content) == 1:
            singles.setdefault(content[0], value)
        elif g.is_onnx(node, "Concat"):
            rewritten += _spelled(model, node, facts, singles)
    return rewritten


def read_single_dimensions(model: ir.Model, facts: ShapeFacts) -> int:
    """Read dimensions off as vectors of one, where they are made into that; returns how many Unsqueezes went."""
    gone = 0
    if g.opset_of(model) < _SHAPE_WITH_BOUNDS:
        return 0
    for node in facts.nodes(("Gather",)):
        if node.outputs[0].is_graph_output():
            continue
        number = node.outputs[0]
        opened = [
            n
            for n in number.consumers()
            if g.is_onnx(n, "Unsqueeze") and n.graph is model.graph and not n.outputs[0].is_graph_output()
        ]
        source = _dimension_read(node, facts)
        if source is None or not opened:
            continue
        single = _shape_at(model, node, *source)
        for each in opened:
            if g.replace_value(each.outputs[0], single):
                model.graph.remove(each, safe=True)
                gone += 1
        if number.uses():
            flat = ir.node("Squeeze", [single], name=node.name)
            flat.outputs[0].type, flat.outputs[0].shape = number.type, number.shape
            model.graph.insert_before(node, flat)
            g.replace_value(number, flat.outputs[0])
            name, number.name = number.name, None
            flat.outputs[0].name = name
        model.graph.remove(node, safe=True)
    return gone


def _dimension_read(node: ir.Node, facts: ShapeFacts) -> tuple[ir.Value, int] | None:
    """x and i of Gather(Shape(x), i), for a number i."""
    measured = None if node.inputs[0] is None else node.inputs[0].producer()
    place = facts.content(node.inputs[1])
    if measured is None or not g.is_onnx(measured, "Shape") or measured.attributes or place is None or place.ndim:
        return None
    value, axis = measured.inputs[0], place.item()
    shape = facts.shape(value)
    if value is None or shape is None or not isinstance(axis, int) or not -len(shape) <= axis < len(shape):
        return None
    return value, axis % len(shape)


def _spelled(model: ir.Model, node: ir.Node, facts: ShapeFacts, singles: dict[Size, ir.Value]) -> bool:
    parts: list[ir.Value | list[int]] = []
    changed = False
    for value in node.inputs:
        elements = _elements(model, node, value, facts, singles)
        changed |= elements is not None
        for element in [value] if elements is None else elements:
            if isinstance(element, int) and parts and isinstance(parts[-1], list):
                parts[-1].append(element)
            elif element is not None:
                parts.append([element] if isinstance(element, int) else element)
    if not changed:
        return False
    name = f"{node.outputs[0].name}_sizes"
    inputs = [
        g.add_initializer(model.graph, name, np.array(part, np.int64)) if isinstance(part, list) else part
        for part in parts
    ]
    node.resize_inputs(len(inputs))
    for place, value in enumerate(inputs):
        node.replace_input_with(place, value)
    return True


def _elements(
    model: ir.Model, node: ir.Node, value: ir.Value | None, facts: ShapeFacts, singles: dict[Size, ir.Value]
) -> list[ir.Value | int] | None:
    """The elements of a longer piece that is computed, as numbers and vectors of one; None where it has to stay."""
    content = facts.content(value)
    if value is None or content is None or len(content) < 2 or g.constant_of(value) is not None:
        return None
    missing = {size for size in content if isinstance(size, Dim) and size not in singles}
    if missing:
        if len(missing) > 1 or g.sole_consumer(value) is not node:
            return None
        (size,) = missing
        found = _read_off(model, node, size, facts)
        if found is None:
            return None
        singles[size] = found
    return [size if isinstance(size, int) else singles[size] for size in content]


def _read_off(model: ir.Model, node: ir.Node, size: Dim, facts: ShapeFacts) -> ir.Value | None:
    """A dimension of an input of the model, as a vector of one made before `node`."""
    if g.opset_of(model) < _SHAPE_WITH_BOUNDS:
        return None
    for given in model.graph.inputs:
        shape = facts.shape(given) or ()
        if size in shape:
            return _shape_at(model, node, given, shape.index(size))
    return None


def _shape_at(model: ir.Model, node: ir.Node, value: ir.Value, axis: int) -> ir.Value:
    """One dimension of `value` as a vector, made before `node`."""
    made = ir.node("Shape", [value], {"start": axis, "end": axis + 1})
    made.outputs[0].type = ir.TensorType(ir.DataType.INT64)
    made.outputs[0].shape = ir.Shape([1])
    made.outputs[0].name = g.fresh_name(model.graph, f"{value.name}_{axis}")
    made.name = g.fresh_name(model.graph, f"{value.name}/Shape")
    model.graph.insert_before(node, made)
    return made.outputs[0]
