"""What can be known of shapes and of integer vectors computed from shapes, while some dimensions stay dynamic.

`ShapeFacts(model)` walks the graph once, by the rules of `rules.py` and `vectors.py`. `shape(value)` is a tuple of
integers and `Dim`s, `content(value)` the elements of an integer scalar or vector that shape arithmetic produced.
Dimension names are taken at their word (ONNX: equal names, equal sizes), so let `inference.infer_facts` make them: it
keeps the names of the model's inputs and forgets those on other values, where exporters write names that hold for one
trace only.
"""

from __future__ import annotations

import re
from collections.abc import Container

import numpy as np
import onnx_ir as ir

from graphopt import graph as g
from graphopt.shapes.dimensions import Dim, Size
from graphopt.shapes.rules import RULES, RULES_OF_SEVERAL, Shape
from graphopt.shapes.vectors import STEPS, objects, scalar

_NAME = re.compile(r"[A-Za-z_][\w.\-]*")
_NAMELESS = frozenset({"none", "unk", "unknown", "dynamic", "dyn", "any"})
_LONGEST_VECTOR = 64
_MEASURES = frozenset({"Shape", "Size"})
_HAVE_RULES = _MEASURES | RULES.keys() | RULES_OF_SEVERAL.keys()
_ARITHMETIC = frozenset({ir.DataType.INT64, ir.DataType.INT32})


class ShapeFacts:
    """Shapes and shape vectors of a model's main graph, as they are now."""

    def __init__(self, model: ir.Model):
        self._opset = g.opset_of(model)
        self._shapes: dict[ir.Value, Shape] = {}
        self._recorded: dict[ir.Value, Shape | None] = {}
        self._contents: dict[ir.Value, np.ndarray | None] = {}
        self._constants: dict[ir.Value, np.ndarray | None] = {}
        self._vectors: list[tuple[ir.Value, np.ndarray]] = []
        self._graph = model.graph
        self._nodes: list[tuple[str, ir.Node]] = []
        self.update(model)

    def update(self, model: ir.Model) -> None:
        """Learn what is new since the graph was changed; what is known of a value stays true whatever else goes."""
        self._vectors = []
        self._recorded = {}
        self._nodes = [(node.op_type, node) for node in model.graph if g.is_onnx(node)]
        for op, node in self._nodes:
            value = node.outputs[0] if node.outputs else None
            if value is None or op not in _HAVE_RULES:
                continue
            content = self._contents.get(value)
            if content is None and (op in _MEASURES or (op in STEPS and _may_be_size(op, value))):
                content = self._evaluate(node)
                if content is not None and content.size > _LONGEST_VECTOR:
                    content = None
            if content is not None:
                self._contents[value] = content
                self._shapes[value] = content.shape
                self._vectors.append((value, content))
            elif value not in self._shapes:
                self._learn_shape(op, node)

    def _learn_shape(self, op: str, node: ir.Node) -> None:
        rule = RULES.get(op)
        if rule is not None:
            shape = rule(self, node)
            if shape is not None:
                self._shapes[node.outputs[0]] = self._sharpen(shape, node.outputs[0])
        elif op in RULES_OF_SEVERAL:
            for value, shape in zip(node.outputs, RULES_OF_SEVERAL[op](self, node), strict=False):
                self._shapes[value] = self._sharpen(shape, value)

    def nodes(self, op_types: Container[str]) -> list[ir.Node]:
        """Those of the main graph and the standard domain that were there when this was last updated, in order."""
        graph = self._graph
        return [node for op, node in self._nodes if op in op_types and node.graph is graph]

    @staticmethod
    def has_rule(node: ir.Node) -> bool:
        """Whether there is a rule here for the shapes that a node makes."""
        return node.op_type in _HAVE_RULES and node.domain in ("", "ai.onnx")

    def shape(self, value: ir.Value | None) -> Shape | None:
        """The dimensions of `value`; None when its rank is unknown."""
        if value is None:
            return None
        known = self._shapes.get(value)
        if known is not None:
            return known
        if value not in self._recorded:
            self._recorded[value] = _recorded_shape(value)
        return self._recorded[value]

    def content(self, value: ir.Value | None) -> np.ndarray | None:
        """Elements of an integer scalar or vector: an object array of integers and `Dim`s; None when unknown.

        Of truth values too: 0 and 1.
        """
        if value is None:
            return None
        if value not in self._contents:
            array = self.constant(value)
            small = array is not None and array.ndim <= 1 and array.size <= _LONGEST_VECTOR
            kept = array is not None and small and array.dtype in (np.int64, np.int32, np.bool_)
            self._contents[value] = objects(array) if array is not None and kept else None
        return self._contents[value]

    def constant(self, value: ir.Value | None) -> np.ndarray | None:
        """`graph.constant_of`, decoded once."""
        if value is None:
            return None
        if value not in self._constants:
            self._constants[value] = g.constant_of(value)
        return self._constants[value]

    def are_complete(self, model: ir.Model) -> bool:
        """Whether every shape is known, in numbers and in dimensions of the model's inputs: nothing can be added."""
        named = {
            atom
            for value in model.graph.inputs
            for size in self.shape(value) or ()
            if isinstance(size, Dim)
            for monomial in size.terms
            for atom in monomial
        }
        seen: set[int] = set()  # many values share one tuple
        for node in model.graph:
            for value in node.outputs:
                shape = self._shapes.get(value) if value.name else ()
                if shape is None or (value.type is None and value.name):
                    return False
                if id(shape) in seen:
                    continue
                seen.add(id(shape))
                for size in shape:
                    if isinstance(size, Dim) and not all(a in named for m in size.terms for a in m):
                        return False
        return True

    def vectors(self) -> list[tuple[ir.Value, np.ndarray]]:
        """The computed integer values that are known at least in part, in topological order."""
        return self._vectors

    def _sharpen(self, shape: Shape, value: ir.Value) -> Shape:
        """Integers that ONNX's own inference found are better than anything derived here."""
        recorded = value.shape
        if recorded is None or len(recorded) != len(shape):
            return shape
        if all(r == d for r, d in zip(recorded, shape, strict=True) if isinstance(r, int)):
            return shape
        return tuple(r if isinstance(r, int) else d for r, d in zip(recorded, shape, strict=True))

    def _evaluate(self, node: ir.Node) -> np.ndarray | None:
        op = node.op_type
        if op in _MEASURES:
            shape = self.shape(node.inputs[0])
            if shape is None:
                return None
            if op == "Shape":
                return objects(shape[slice(g.attribute(node, "start", None), g.attribute(node, "end", None))])
            total: Size = 1
            for size in shape:
                total = size * total
            return scalar(total)
        operands = [None if v is None else self.content(v) for v in node.inputs]
        if any(v is not None and c is None for v, c in zip(node.inputs, operands, strict=True)):
            return None
        if not operands or operands[0] is None:
            return None
        try:
            found = STEPS[op](node, operands, self._opset)
        except (IndexError, ValueError, TypeError, np.exceptions.AxisError):
            return None  # an invalid or unusual node: left to the runtime
        return found if found is None or found.ndim <= 1 else None


def _may_be_size(op: str, value: ir.Value) -> bool:
    """Whether what a step makes is an integer, or tells whether two are the same."""
    dtype = value.dtype
    return dtype in _ARITHMETIC or (op == "Equal" and dtype == ir.DataType.BOOL)


def store_known_vectors(model: ir.Model, facts: ShapeFacts) -> int:
    """Turn computed integer vectors without an unknown element into initializers; returns how many."""
    stored = 0
    for value, content in facts.vectors():
        producer = value.producer()
        if producer is None or producer.graph is not model.graph or len(producer.outputs) != 1 or not value.uses():
            continue
        if value.is_graph_output() or value.dtype is None or not all(isinstance(e, int) for e in content.reshape(-1)):
            continue
        constant = g.add_initializer(model.graph, str(value.name), content.astype(value.dtype.numpy()))
        if g.replace_value(value, constant):
            model.graph.remove(producer, safe=True)
            stored += 1
    return stored


def _recorded_shape(value: ir.Value) -> Shape | None:
    array = value.const_value
    if array is not None and not value.is_graph_input():
        return tuple(int(d) for d in array.shape.numpy())
    if value.shape is None or not (value.type is None or isinstance(value.type, ir.TensorType)):
        return None
    return tuple(_size(d, f"{value.name}#{axis}") for axis, d in enumerate(value.shape))


def is_name(text: str) -> bool:
    """Whether a dimension of a file that is called so is one that has a name: not "?" and the like."""
    return _NAME.fullmatch(text) is not None and text.lower() not in _NAMELESS


def _size(dimension: int | ir.SymbolicDim, anonymous: str) -> Size:
    if isinstance(dimension, int):
        return dimension
    name = dimension.value
    if name and is_name(name):
        return Dim.named(name)
    return Dim.named(f"#{anonymous}")
