"""What a fusion is, and how one takes the place of the nodes it stands for.

A group of nodes is replaced only if nobody else looks into it: every value that a node of it makes, but for the result
of the last, is read by nodes of the group alone, and is no output of the model nor read in a subgraph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt import graph as g
from graphopt.shapes.dimensions import Size
from graphopt.shapes.facts import ShapeFacts


@dataclass
class View:
    """What patterns may know of the model. Values built for several places are kept in `shared`, by what they are."""

    model: ir.Model
    facts: ShapeFacts
    limit: int
    """The newest operator set that may be used."""
    shared: dict[Any, ir.Value] = field(default_factory=dict)

    @property
    def opset(self) -> int:
        return g.opset_of(self.model)

    def shape(self, value: ir.Value | None) -> tuple[Size, ...] | None:
        return self.facts.shape(value)


class Writer:
    """Adds nodes before `place`, and constants."""

    def __init__(self, graph: ir.Graph, place: ir.Node):
        self.graph = graph
        self.place = place
        self.label = str(place.outputs[0].name)

    def node(self, op_type: str, inputs: Sequence[ir.Value | None], attributes: Mapping[str, Any] | None = None):
        """The only output of a new node; its name is made from the name of what it replaces."""
        made = ir.node(op_type, inputs, attributes or {}, name=g.fresh_name(self.graph, f"{self.label}/{op_type}"))
        self.graph.insert_before(self.place, made)
        value = made.outputs[0]
        value.name = g.fresh_name(self.graph, f"{self.label}_{op_type}")
        if inputs and inputs[0] is not None and inputs[0].dtype is not None:
            value.type = ir.TensorType(inputs[0].dtype)
        return value

    def constant(self, name: str, array: np.ndarray) -> ir.Value:
        return g.add_initializer(self.graph, f"{self.label}_{name}", array)

    def reshaped(self, value: ir.Value, target: Sequence[int]) -> ir.Value:
        return self.node("Reshape", [value, self.constant("shape", np.array(target, np.int64))])


@dataclass(frozen=True)
class Fusion:
    """`build` makes a value equal to the first output of `root`, the last of `nodes` (`root` among them or not)."""

    root: ir.Node
    nodes: frozenset[ir.Node]
    opset: int
    build: Callable[[Writer], ir.Value]


def is_closed(fusion: Fusion) -> bool:
    """Whether nobody outside reads what the nodes of the group make, but for its result."""
    members = {*fusion.nodes, fusion.root}
    for node in members:
        for value in node.outputs:
            if value is fusion.root.outputs[0]:
                continue
            if value.is_graph_output() or any(usage.node not in members for usage in value.uses()):
                return False
    return True


def replace(model: ir.Model, fusion: Fusion) -> None:
    """Put what `fusion` builds in the place of its nodes."""
    graph = model.graph
    old = fusion.root.outputs[0]
    new = fusion.build(Writer(graph, fusion.root))
    name, shape, type_ = old.name, old.shape, old.type
    if not g.replace_value(old, new):
        raise AssertionError("a fresh value can always replace another")
    old.name, new.name, new.shape, new.type = None, name, shape, type_
    doomed = {*fusion.nodes, fusion.root}
    while doomed:  # readers before what they read
        free = [node for node in doomed if not any(v.uses() for v in node.outputs)]
        assert free, "a group that is not closed"
        graph.remove(free, safe=True)
        doomed.difference_update(free)


def producer(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """The ONNX node of one of these types whose only output `value` is."""
    node = None if value is None else value.producer()
    return node if node is not None and len(node.outputs) == 1 and g.is_onnx(node, *op_types) else None


def reader(value: ir.Value, *op_types: str) -> ir.Node | None:
    """The one node that reads `value`, if it is of one of these types, in the same graph, and nobody else does."""
    node = g.sole_consumer(value)
    made_by = value.producer()
    if node is None or not g.is_onnx(node, *op_types) or made_by is None or node.graph is not made_by.graph:
        return None
    return node


def scalar(value: ir.Value | None) -> float | None:
    """The number that a constant of one element holds; None for another value."""
    array = g.constant_of(value)
    if array is None or array.size != 1 or array.dtype.kind not in "fiu":
        return None
    return float(array.reshape(-1)[0])


def is_float(*values: ir.Value | None) -> bool:
    """Whether all are float32: the one type that all fused operators are computed in by every runtime."""
    return all(v is not None and v.dtype == ir.DataType.FLOAT for v in values)


def same_shape(view: View, values: Iterable[ir.Value]) -> bool:
    """Whether the shapes are known and equal."""
    shapes = {view.shape(v) for v in values}
    return len(shapes) == 1 and None not in shapes


def near(found: float, wanted: float, dtype: ir.DataType | None = ir.DataType.FLOAT) -> bool:
    """Whether a constant is the number meant: within four units in the last place of its type.

    Exporters round constants once or twice on the way (0.79788458 for sqrt(2/pi) = 0.79788456).
    """
    kind = np.float32 if dtype is None else dtype.numpy()
    return abs(found - wanted) <= 4 * float(np.finfo(kind).eps) * abs(wanted)
