"""A new value in the place of an old one, under its name."""

from __future__ import annotations

import onnx_ir as ir

from graphopt import graph as g


def take_over(graph: ir.Graph, old: ir.Node, value: ir.Value) -> None:
    """`value` gets the readers, name and declared shape of the node's first output, and the node goes."""
    output = old.outputs[0]
    name, value.shape, value.type = output.name, output.shape, output.type or value.type
    g.replace_value(output, value)
    output.name, value.name = None, name
    graph.remove(old, safe=True)
