"""Nodes that stand for one operator, made one by one and put into its place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

from graphopt import graph as g


class Writer:
    """Collects the nodes that stand for one operator, named after it."""

    def __init__(self, node: ir.Node):
        self.name = g.label(node)
        self.nodes: list[ir.Node] = []

    def emit(
        self, op_type: str, inputs: Sequence[ir.Value | None], attributes: dict[str, Any] | None = None
    ) -> ir.Value:
        """The output of a new node."""
        label = f"{self.name}/{op_type}_{len(self.nodes)}"
        made = ir.node(op_type, inputs, attributes or {}, name=label)
        made.outputs[0].name = f"{label}_output"
        self.nodes.append(made)
        return made.outputs[0]

    def replace(self, node: ir.Node, result: ir.Value) -> None:
        """Put the nodes into the place of `node`; `result`, of one of them, takes the place of its only output."""
        assert node.graph is not None
        output = node.outputs[0]
        result.name, result.type, result.shape = output.name, output.type, output.shape
        output.name = None
        node.graph.insert_before(node, self.nodes)
        output.replace_all_uses_with(result, replace_graph_outputs=True)
        node.graph.remove(node, safe=True)
