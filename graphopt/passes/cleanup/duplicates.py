"""Common subexpressions: nodes that compute the same thing from the same values, and equal small constants."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphopt import graph as g
from graphopt.shapes.constants import MERGED_CONSTANT_BYTES, NONDETERMINISTIC, small_content
from graphopt.shapes.facts import ShapeFacts

_MERGED_INDEX_BYTES = 1 << 20
"""Integers of 64 bits are no weights: folding leaves tables of indices, one for every node that reads such a table."""


class ConstantKeys:
    """What makes two constants the same, read once of each."""

    def __init__(self) -> None:
        self._keys: dict[ir.Value, tuple | None] = {}

    def of(self, value: ir.Value) -> tuple | None:
        """Type, shape and content; None of what is no small constant."""
        if value not in self._keys:
            self._keys[value] = _constant_key(value)
        return self._keys[value]


def _constant_key(value: ir.Value) -> tuple | None:
    limit = _MERGED_INDEX_BYTES if value.dtype == ir.DataType.INT64 else MERGED_CONSTANT_BYTES
    return None if value.const_value is None else small_content(value.const_value, limit)


def merge_duplicates(model: ir.Model, facts: ShapeFacts, constants: ConstantKeys) -> int:
    """Merge equal constants, equal shape vectors and equal nodes of the main graph; returns nodes removed."""
    _merge_constants(model.graph, constants)
    return _merge_vectors(model, facts) + _merge_nodes(model)


def _merge_constants(graph: ir.Graph, constants: ConstantKeys) -> None:
    first: dict[tuple, ir.Value] = {}
    for value in list(graph.initializers.values()):
        key = constants.of(value)
        if key is None or value.is_graph_input() or value.is_graph_output() or not value.name:
            continue
        kept = first.setdefault(key, value)
        if kept is not value:
            value.replace_all_uses_with(kept)
            del graph.initializers[value.name]


def _merge_vectors(model: ir.Model, facts: ShapeFacts) -> int:
    """Integer vectors with equal symbolic contents: Shape(Relu(x)) is Shape(x)."""
    first: dict[tuple, ir.Value] = {}
    removed = []
    for value, content in facts.vectors():
        producer = value.producer()
        if producer is None or producer.graph is not model.graph or not value.uses():
            continue
        key = (value.dtype, content.shape, tuple(content.reshape(-1)))
        kept = first.setdefault(key, value)
        if kept is not value and g.replace_value(value, kept):
            removed.append(producer)
    model.graph.remove(removed, safe=True)
    return len(removed)


def _merge_nodes(model: ir.Model) -> int:
    """Nodes are told apart by operator and operands first; attributes are looked at only where those are equal."""
    alone: dict[tuple, ir.Node] = {}
    first: dict[tuple, ir.Node] = {}
    removed = []
    for node in model.graph:
        rough = (node.op_type, node.domain, tuple(map(id, node.inputs)))
        other = alone.setdefault(rough, node)
        if other is node:
            continue
        for each in (other, node):
            key = _identity(each)
            kept = first.setdefault(key, each) if key is not None else each
        if kept is node:
            continue
        pairs = list(zip(node.outputs, kept.outputs, strict=True))
        if any(old.is_graph_output() for old, _ in pairs) and len(pairs) > 1:
            continue
        if all(g.replace_value(old, new) for old, new in pairs):
            removed.append(node)
    model.graph.remove(removed, safe=True)
    return len(removed)


def _identity(node: ir.Node) -> tuple | None:
    """What makes two nodes the same; None for nodes that must stay apart."""
    if node.op_type in NONDETERMINISTIC or g.holds_subgraphs(node) or node.op_type == "Constant":
        return None
    if not g.is_onnx(node) and node.domain not in ("com.microsoft", "ai.onnx.ml"):
        return None
    if g.is_onnx(node, "Dropout") and g.input_of(node, 2) is not None:
        return None
    attributes = []
    for name in sorted(node.attributes):
        found = node.attributes[name]
        if found.type == ir.AttributeType.TENSOR:
            if found.value.dtype == ir.DataType.STRING:
                return None
            attributes.append((name, found.value.dtype, tuple(found.value.shape.numpy()), found.value.tobytes()))
        elif found.is_ref() or not isinstance(found.value, (int, float, str, bytes, tuple, list)):
            return None
        else:
            plain = tuple(found.value) if isinstance(found.value, (tuple, list)) else found.value
            attributes.append((name, found.type, np.asarray(plain).tobytes() if isinstance(plain, float) else plain))
    written = tuple(bool(v.name) for v in node.outputs)
    return node.op_identifier(), written, tuple(id(v) for v in node.inputs), tuple(attributes)
