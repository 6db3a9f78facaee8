"""A part as an ONNX model of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt.partition.cutting import Part
from graphopt.partition.nodes import Nodes
from graphopt.targets.base import TensorType


@dataclass(frozen=True)
class PartModel:
    """`model` computes the values `outputs` from the values `inputs`, all named as in the whole model."""

    part: Part
    model: ir.Model
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def extract(model: ir.Model, nodes: Nodes, parts: Sequence[Part], types: Mapping[str, TensorType]) -> list[PartModel]:
    """One model for each of `parts`; weights are shared with `model`, which is not changed. Parts that compute nothing
    anybody reads are left out."""
    home = {node: number for number, part in enumerate(parts) for node in part.nodes}
    makers = {id(value): i for i, node in enumerate(nodes.nodes) for value in node.outputs}
    final = {id(value) for value in model.graph.outputs}
    read_outside = {
        id(value)
        for reader, values in enumerate(nodes.reads)
        for value in values
        if id(value) in makers and home[makers[id(value)]] != home[reader]
    }
    found = []
    for number, part in enumerate(parts):
        reads = {id(v): v for i in part.nodes for v in nodes.reads[i] if home.get(makers.get(id(v), -1)) != number}
        makes = [v for i in part.nodes for v in nodes.nodes[i].outputs if id(v) in final or id(v) in read_outside]
        if makes:
            made = _model(model, list(reads.values()), makes, types)
            found.append(PartModel(part, made, tuple(str(v.name) for v in made.graph.inputs), _names(makes)))
    return found


def _model(
    model: ir.Model, inputs: Sequence[ir.Value], outputs: Sequence[ir.Value], types: Mapping[str, TensorType]
) -> ir.Model:
    graph = ir.convenience.extract(model.graph, inputs, outputs)
    graph.inputs[:] = [v for v in graph.inputs if v.uses() or v.is_graph_output()]
    for value in (*graph.inputs, *graph.outputs):
        kind = types.get(str(value.name))
        if kind is not None:
            value.type = ir.TensorType(ir.DataType.from_numpy(np.dtype(kind.dtype)))
            value.shape = ir.Shape(kind.shape)
    made = ir.Model(graph, ir_version=model.ir_version)
    made.opset_imports.update(model.opset_imports)
    return made


def _names(values: Sequence[ir.Value]) -> tuple[str, ...]:
    return tuple(str(value.name) for value in values)
