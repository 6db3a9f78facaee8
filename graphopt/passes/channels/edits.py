"""What cutting channels changes in a node: constants are sliced, integers in attributes and shape inputs rewritten."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import onnx_ir as ir

from graphopt import graph as g

Kept = Callable[[np.ndarray], np.ndarray]
"""Labels -> booleans: which of them stay."""


class Edit(Protocol):
    """A change of one node."""

    def apply(self, graph: ir.Graph, kept: Kept) -> None: ...


@dataclass(frozen=True)
class SliceConstant:
    """Keep what stays along `axis` of a constant input (negative: from the end); an input left out stays so."""

    node: ir.Node
    index: int
    axis: int
    labels: np.ndarray

    def apply(self, graph: ir.Graph, kept: Kept) -> None:
        value, stays = g.input_of(self.node, self.index), kept(self.labels)
        if value is None or stays.all():
            return
        array = g.constant_of(value)
        assert array is not None
        set_constant(graph, self.node, self.index, np.compress(stays, array, self.axis))


@dataclass(frozen=True)
class SetGroups:
    """`group` of a convolution becomes the number of labels that stay; one label a group."""

    node: ir.Node
    labels: np.ndarray

    def apply(self, graph: ir.Graph, kept: Kept) -> None:
        self.node.attributes["group"] = ir.AttrInt64("group", int(kept(self.labels).sum()))


@dataclass(frozen=True)
class ReplaceInts:
    """An integer vector, an input or an attribute of the node, becomes what `compute` says."""

    node: ir.Node
    where: int | str
    compute: Callable[[Kept], list[int]]
    old: tuple[int, ...]

    def apply(self, graph: ir.Graph, kept: Kept) -> None:
        new = self.compute(kept)
        if tuple(new) == self.old:
            return
        if isinstance(self.where, str):
            self.node.attributes[self.where] = ir.AttrInt64s(self.where, new)
            return
        old = g.constant_of(g.input_of(self.node, self.where))
        set_constant(graph, self.node, self.where, np.array(new, np.int64 if old is None else old.dtype))


@dataclass(frozen=True)
class ReplacePiece:
    """In a vector that a Concat puts together, the constant piece `piece` becomes the number of labels that stay."""

    node: ir.Node
    index: int
    piece: int
    labels: np.ndarray

    def apply(self, graph: ir.Graph, kept: Kept) -> None:
        count, vector = int(kept(self.labels).sum()), self.node.inputs[self.index]
        if count == len(self.labels):
            return
        old = vector.producer() if vector is not None else None
        assert old is not None and vector is not None
        piece = g.constant_of(old.inputs[self.piece])
        assert piece is not None
        new = ir.node("Concat", list(old.inputs), {"axis": 0}, name=g.fresh_name(graph, f"{g.label(old)}_cut"))
        new.outputs[0].name = g.fresh_name(graph, f"{vector.name}_cut")
        new.outputs[0].type, new.outputs[0].shape = vector.type, vector.shape
        graph.insert_before(self.node, new)
        set_constant(graph, new, self.piece, np.full_like(piece, count))
        self.node.replace_input_with(self.index, new.outputs[0])
        if not vector.uses() and not vector.is_graph_output():
            graph.remove(old, safe=True)


@dataclass(frozen=True)
class RepointShape:
    """The input at `index`, the Shape of some value, becomes the Shape of `value`."""

    node: ir.Node
    index: int
    value: ir.Value

    def apply(self, graph: ir.Graph, kept: Kept) -> None:
        vector = self.node.inputs[self.index]
        old = vector.producer() if vector is not None else None
        assert old is not None and vector is not None
        if old.inputs[0] is self.value:
            return
        shape = ir.node("Shape", [self.value], name=g.fresh_name(graph, f"{g.label(old)}_cut"))
        shape.outputs[0].name = g.fresh_name(graph, f"{vector.name}_cut")
        shape.outputs[0].type, shape.outputs[0].shape = vector.type, vector.shape
        graph.insert_before(self.node, shape)
        self.node.replace_input_with(self.index, shape.outputs[0])
        if not vector.uses() and not vector.is_graph_output():
            graph.remove(old, safe=True)


def set_constant(graph: ir.Graph, node: ir.Node, index: int, array: np.ndarray) -> None:
    """Make `array` the input at `index`; what other nodes read stays as it is."""
    old = g.input_of(node, index)
    own = old is not None and old.is_initializer() and len(old.uses()) == 1
    if own and old is not None and not old.is_graph_output() and not old.is_graph_input():
        old.const_value = ir.Tensor(np.ascontiguousarray(array).reshape(array.shape), name=old.name)
        old.shape = ir.Shape(array.shape)
        return
    if len(node.inputs) <= index:
        node.resize_inputs(index + 1)
    name = str(old.name) if old is not None else f"{g.label(node)}_{index}"
    node.replace_input_with(index, g.add_initializer(graph, name, array))
