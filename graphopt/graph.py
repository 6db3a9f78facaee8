"""Walking and rewiring an `onnx_ir` graph."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from contextvars import ContextVar

import numpy as np
import onnx_ir as ir


def tensor_of(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor of an initializer or a Constant node; None when the value is computed.

    Unlike `onnx_ir.convenience.get_const_tensor` it never renames the tensor, which clones of a model share.
    """
    if value is None or value.const_value is not None:
        return None if value is None else value.const_value
    node = value.producer()
    if node is None or not is_onnx(node, "Constant"):
        return None
    found = node.attributes.get("value")
    if found is None:
        return ir.convenience.get_const_tensor(value)  # value_int and the like: a tensor of its own
    return None if found.is_ref() else found.value  # `as_tensor` checks a protocol, which is slow


def constant_of(value: ir.Value | None) -> np.ndarray | None:
    """The array behind an initializer or a Constant node; None when it is computed or a caller may override it."""
    if value is None or value.is_graph_input():
        return None
    tensor = tensor_of(value)
    return None if tensor is None else tensor.numpy()


def integers_of(value: ir.Value | None) -> list[int] | None:
    """A constant integer scalar or vector as a list; None when it is not one."""
    array = constant_of(value)
    if array is None or array.ndim > 1 or array.dtype.kind not in "iu":
        return None
    return [int(x) for x in array.reshape(-1)]


_MOVES = ("Expand", "Flatten", "Identity", "Reshape", "Slice", "Squeeze", "Tile", "Transpose", "Unsqueeze")


def chosen_constants(value: ir.Value | None) -> list[np.ndarray] | None:
    """Constants that hold every number which a value can hold: those that Where chooses from, moved or not; or None."""
    constant = constant_of(value)
    if constant is not None:
        return [constant]
    node = None if value is None else value.producer()
    if node is None or not is_onnx(node, "Where", *_MOVES):
        return None
    found = [chosen_constants(v) for v in (node.inputs[1:] if node.op_type == "Where" else node.inputs[:1])]
    return None if any(each is None for each in found) else [array for each in found for array in each or ()]


def sole_consumer(value: ir.Value) -> ir.Node | None:
    """The one node that reads `value`; None when there are more, none, or it is a graph output."""
    if value.is_graph_output():
        return None
    consumers = {usage.node for usage in value.uses()}
    return next(iter(consumers)) if len(consumers) == 1 else None


def attribute(node: ir.Node, name: str, default):
    """The value of an attribute, or ONNX's default as given."""
    found = node.attributes.data.get(name)  # of the dict behind it: `get` of a UserDict is many times slower
    return default if found is None else found.value


def input_of(node: ir.Node, index: int) -> ir.Value | None:
    """The input at `index`; None when it is left out, in the middle or at the end."""
    return node.inputs[index] if index < len(node.inputs) else None


def is_onnx(node: ir.Node, *op_types: str) -> bool:
    """Whether `node` is an operator of the standard domain, of one of these types if any are given."""
    return node.domain in ("", "ai.onnx") and (not op_types or node.op_type in op_types)


def opset_of(model: ir.Model) -> int:
    """The version of the standard operator set (0 when the model imports none)."""
    return model.opset_imports.get("", model.opset_imports.get("ai.onnx", 0))


def dims_of(value: ir.Value | None) -> tuple[int | None, ...] | None:
    """The shape with None for each dynamic dimension; None when even the rank is unknown."""
    if value is None or value.shape is None:
        return None
    return tuple(d if isinstance(d, int) else None for d in value.shape)


def static_shape(value: ir.Value | None) -> tuple[int, ...] | None:
    """The shape when every dimension is known."""
    dims = dims_of(value)
    if dims is None or any(d is None for d in dims):
        return None
    return tuple(d for d in dims if d is not None)


def holds_subgraphs(node: ir.Node) -> bool:
    """Whether the node carries graphs in its attributes (If, Loop, Scan, SequenceMap)."""
    for attribute in node.attributes.data.values():
        if attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
            return True
    return False


def subgraphs_of(node: ir.Node) -> list[ir.Graph]:
    """The graphs in the attributes of a node, in order."""
    if not holds_subgraphs(node):
        return []
    found: list[ir.Graph] = []
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH and not attribute.is_ref():
            found.append(attribute.as_graph())
        elif attribute.type == ir.AttributeType.GRAPHS and not attribute.is_ref():
            found.extend(attribute.as_graphs())
    return found


def replace_value(old: ir.Value, new: ir.Value) -> bool:
    """Make every reader of `old` read `new`; the caller removes the node that made `old`.

    A graph output keeps its name, type and declared shape: `new` takes them over. Returns False, changing
    nothing, where that cannot be: `new` is a graph input, an initializer, itself an output, or of another graph.
    """
    if old is new:
        return False
    if old.is_graph_output():
        made_here = new.producer() is not None and new.graph is old.graph
        if not made_here or new.is_graph_output() or old.graph is None:
            return False
        name, shape, type_ = old.name, old.shape, old.type
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        old.name = None
        new.name, new.shape, new.type = name, shape, type_
        return True
    old.replace_all_uses_with(new)
    if new.shape is None:
        new.shape = old.shape
    if new.type is None:
        new.type = old.type
    return True


_remembered: ContextVar[tuple[ir.Graph, set[str | None]] | None] = ContextVar("_remembered", default=None)


@contextlib.contextmanager
def remembering_names(graph: ir.Graph) -> Iterator[None]:
    """While this lasts, `fresh_name` of this graph takes no time: names are collected once.

    Every name given meanwhile must be an old one or come from `fresh_name`; what loses its name keeps it taken.
    """
    known = _remembered.get()
    if known is not None and known[0] is graph:
        yield
        return
    token = _remembered.set((graph, _names(graph)))
    try:
        yield
    finally:
        _remembered.reset(token)


def _names(graph: ir.Graph) -> set[str | None]:
    taken = set(graph.initializers) | {v.name for v in graph.inputs}
    for node in graph:
        taken.add(node.name)
        for value in node.outputs:
            taken.add(value.name)
        for inner in subgraphs_of(node):
            taken |= _names(inner)
    return taken


@contextlib.contextmanager
def collection_paused() -> Iterator[None]:
    """No garbage collection while this lasts: a graph is many small objects that refer to each other, and looking
    through all of them for dead ones, again and again as new ones are made, is a third of the work of a clean-up."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def fresh_name(graph: ir.Graph, wanted: str) -> str:
    """`wanted`, or `wanted_2`, `wanted_3` ... : a name no value or node of the graph or its subgraphs has yet."""
    known = _remembered.get()
    taken = known[1] if known is not None and known[0] is graph else _names(graph)
    name, number = wanted, 1
    while name in taken:
        number += 1
        name = f"{wanted}_{number}"
    taken.add(name)
    return name


def add_initializer(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """Register `array` under a fresh name made from `name`."""
    name = fresh_name(graph, name)
    contiguous = np.ascontiguousarray(array).reshape(array.shape)  # ascontiguousarray makes scalars 1-D
    tensor = ir.Tensor(contiguous, name=name)
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


def count_nodes(graph: ir.Graph) -> int:
    """Nodes of the graph and its subgraphs that compute something: Constant nodes are not counted."""
    return sum((node.op_type != "Constant") + sum(map(count_nodes, subgraphs_of(node))) for node in graph)


def label(node: ir.Node) -> str:
    """How to name a node to a person: its name, else its first output."""
    return node.name or str(node.outputs[0].name)
