"""Walking and rewiring an `onnx_ir` graph."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir


def constant_of(value: ir.Value | None) -> np.ndarray | None:
    """The array behind an initializer or a Constant node; None when it is computed or a caller may override it."""
    if value is None or value.is_graph_input():
        return None
    tensor = ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def sole_consumer(value: ir.Value) -> ir.Node | None:
    """The one node that reads `value`; None when there are more, none, or it is a graph output."""
    if value.is_graph_output():
        return None
    consumers = {usage.node for usage in value.uses()}
    return next(iter(consumers)) if len(consumers) == 1 else None


def attribute(node: ir.Node, name: str, default):
    """The value of an attribute, or ONNX's default as given."""
    found = node.attributes.get(name)
    return default if found is None else found.value


def fresh_name(graph: ir.Graph, wanted: str) -> str:
    """`wanted`, or `wanted_2`, `wanted_3` ... : a name no value or node of the graph has yet."""
    taken = set(graph.initializers) | {v.name for v in graph.inputs}
    for node in graph:
        taken.add(node.name)
        taken.update(v.name for v in node.outputs)
    name, number = wanted, 1
    while name in taken:
        number += 1
        name = f"{wanted}_{number}"
    return name


def add_initializer(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """Register `array` under a fresh name made from `name`."""
    name = fresh_name(graph, name)
    tensor = ir.Tensor(np.ascontiguousarray(array), name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def remove_unused_initializers(graph: ir.Graph) -> int:
    """Drop initializers nobody reads and that are no input or output; returns how many."""
    unused = [
        name
        for name, value in graph.initializers.items()
        if not value.uses() and not value.is_graph_output() and not value.is_graph_input()
    ]
    for name in unused:
        del graph.initializers[name]
    return len(unused)


def label(node: ir.Node) -> str:
    """How to name a node to a person: its name, else its first output."""
    return node.name or str(node.outputs[0].name)
