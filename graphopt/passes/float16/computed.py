"""A graph that computes in float16, with Casts where float32 begins and ends."""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir

from graphopt import graph as g
from graphopt.passes.base import Skip
from graphopt.passes.float16.narrow import Losses, narrow
from graphopt.passes.float16.operators import READS_ANY, KeepsFloat32, convertible, counting_nodes

FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16


def compute_in_half(
    model: ir.Model, exclude: Collection[str], exclude_types: Collection[str], losses: Losses
) -> tuple[int, list[Skip]]:
    """How many nodes compute in float16 now, and those that do not and why; what constants lost joins `losses`.

    Types of all values must be known. Inputs and outputs of the model stay float32.
    """
    chosen: dict[ir.Node, tuple[list[int], list[int]]] = {}
    skipped: list[Skip] = []
    counting = counting_nodes(model.graph)
    for node in model.graph:
        try:
            if g.label(node) in exclude or node.op_type in exclude_types:
                raise KeepsFloat32("excluded by name" if g.label(node) in exclude else "excluded by type")
            if node in counting:
                raise KeepsFloat32("it computes with sizes or positions")
            chosen[node] = convertible(node, g.opset_of(model))
        except KeepsFloat32 as reason:
            if str(reason):
                skipped.append(Skip(g.label(node), str(reason)))
    made = {node.outputs[index] for node, (_, outputs) in chosen.items() for index in outputs}
    borders = _Borders(model.graph, losses)
    for node, (inputs, _) in chosen.items():
        for index in inputs:
            value = node.inputs[index]
            if value is not None and value not in made:
                node.replace_input_with(index, borders.half(value))
    for value in made:
        value.type = ir.TensorType(HALF)
        readers = [(u.node, u.idx) for u in value.uses() if not _reads_half(u.node, u.idx, chosen)]
        if readers or value.is_graph_output():
            borders.widen(value, readers)
    g.remove_unused_initializers(model.graph)
    return len(chosen), skipped


def _reads_half(node: ir.Node, index: int, chosen: dict[ir.Node, tuple[list[int], list[int]]]) -> bool:
    if node in chosen:
        return index in chosen[node][0]
    return g.is_onnx(node, *READS_ANY)


class _Borders:
    """Casts, at most one a value and direction."""

    def __init__(self, graph: ir.Graph, losses: Losses):
        self.graph = graph
        self.losses = losses
        self._halves: dict[ir.Value, ir.Value] = {}

    def half(self, value: ir.Value) -> ir.Value:
        """A float32 value in float16."""
        if value not in self._halves:
            self._halves[value] = self._narrow(value)
        return self._halves[value]

    def _narrow(self, value: ir.Value) -> ir.Value:
        array = g.constant_of(value)
        if array is not None:
            narrowed = narrow(array)
            self.losses.add(str(value.name), narrowed)
            return g.add_initializer(self.graph, f"{value.name}_float16", narrowed.array)
        cast = self._cast(value, HALF, f"{value.name}_float16")
        producer = value.producer()
        if producer is None:
            self.graph.insert_before(self.graph[0], cast)
        else:
            self.graph.insert_after(producer, cast)
        return cast.outputs[0]

    def widen(self, value: ir.Value, readers: list[tuple[ir.Node, int]]) -> None:
        """Give `readers` (node, input), and the caller where `value` is an output, float32 under the old name."""
        name = str(value.name)
        value.name = g.fresh_name(self.graph, f"{name}_float16")
        cast = self._cast(value, FLOAT, None)
        result = cast.outputs[0]
        result.name = name
        producer = value.producer()
        assert producer is not None
        self.graph.insert_after(producer, cast)
        for reader, index in readers:
            reader.replace_input_with(index, result)
        for index, output in enumerate(self.graph.outputs):
            if output is value:
                self.graph.outputs[index] = result

    def _cast(self, value: ir.Value, to: ir.DataType, name: str | None) -> ir.Node:
        label = g.fresh_name(self.graph, f"{value.name}_to_{to.name.lower()}")
        cast = ir.node("Cast", [value], {"to": to.value}, name=label)
        result = cast.outputs[0]
        result.type, result.shape = ir.TensorType(to), value.shape
        if name is not None:
            result.name = g.fresh_name(self.graph, name)
        return cast
