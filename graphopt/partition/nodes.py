"""Which nodes of a model depend on which, as a partition sees them.

A node that holds graphs (If, Loop, Scan) is one node, and what its graphs read from outside is read by it. Nodes that
depend on constants alone belong to no part: each part that reads them gets a copy, as it does of initializers.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import onnx_ir as ir

from graphopt.graph import holds_subgraphs

RANDOM = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli"}
)
"""Operators that give something else each time: never copied."""


@dataclass(frozen=True)
class Nodes:
    """The nodes of a main graph that are to be parted, in topological order.

    `reads[i]` are the values that node i reads and that are computed or fed, each once; `predecessors[i]` the positions
    of the nodes that make them.
    """

    nodes: tuple[ir.Node, ...]
    reads: tuple[tuple[ir.Value, ...], ...]
    predecessors: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, model: ir.Model, not_copied: Collection[str] = ()) -> Nodes:
        """`model` must be sorted; it is not changed. `not_copied`: names of outputs of nodes that belong to a part even
        where they depend on constants alone."""
        graph = model.graph
        constant = {id(value) for value in graph.initializers.values()}
        needed = {id(value) for value in graph.outputs}
        nodes, reads, position = [], [], {}
        for node in graph:
            runtime = tuple(v for v in _read_values(node) if v.graph is graph and id(v) not in constant)
            kept = any(id(v) in needed or v.name in not_copied for v in node.outputs)
            if not runtime and not kept and not _is_random(node):
                constant.update(id(value) for value in node.outputs)
                continue
            position[node] = len(nodes)
            nodes.append(node)
            reads.append(runtime)
        makers = [[position[p] for v in values if (p := v.producer()) is not None] for values in reads]
        return cls(tuple(nodes), tuple(reads), tuple(tuple(dict.fromkeys(each)) for each in makers))


def _is_random(node: ir.Node) -> bool:
    inner = (n.op_type for graph in subgraphs(node) for n in graph.all_nodes())
    return node.op_type in RANDOM or any(op in RANDOM for op in inner)


def _read_values(node: ir.Node) -> list[ir.Value]:
    """Values that a node reads, those that its graphs read included, each once."""
    found = {id(v): v for v in node.inputs if v is not None}
    for graph in subgraphs(node):
        for inner in graph.all_nodes():
            found.update({id(v): v for v in inner.inputs if v is not None})
    return list(found.values())


def subgraphs(node: ir.Node) -> Iterator[ir.Graph]:
    """The graphs in a node's attributes."""
    if not holds_subgraphs(node):
        return
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()
