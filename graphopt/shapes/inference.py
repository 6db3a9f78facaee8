"""Types and shapes of all values: by graphopt's own rules where they reach everything, by ONNX's inference elsewhere.

ONNX's inference takes and gives protobuf: on a graph of thousands of nodes, writing and reading that takes several
times as long as the rules do. The rules of types are read off ONNX's operator schemas:

    Add: (T, T) -> T         the type of the first input          Shape: (T) -> tensor(int64)       what is written
    Cast: (T1) -> T2         its attribute `to`

and those of shapes are `facts.ShapeFacts`.
"""

from __future__ import annotations

import functools

import onnx
import onnx_ir as ir

from graphopt import graph as g
from graphopt.shapes.dimensions import Dim
from graphopt.shapes.facts import ShapeFacts, is_name
from graphopt.shapes.onnx_inference import forget_names, infer_shapes

Rule = tuple[int, ...] | ir.DataType | str | None
"""Of an output's type: that of the first of these inputs that is given; always this; that in an attribute; no rule."""

_IN_ATTRIBUTE = {"Cast": ("to", None), "ConstantOfShape": ("value", ir.DataType.FLOAT)}
"""Where the type is written, and what it is where nothing is."""
_TENSOR = {f"tensor({name.lower()})": ir.DataType[name] for name in ("FLOAT", "DOUBLE", "FLOAT16", "BFLOAT16", "BOOL")}
_TENSOR |= {f"tensor({name.lower()})": ir.DataType[name] for name in ("INT8", "INT16", "INT32", "INT64")}
_TENSOR |= {f"tensor({name.lower()})": ir.DataType[name] for name in ("UINT8", "UINT16", "UINT32", "UINT64")}


def infer_facts(model: ir.Model, partly: bool = False) -> ShapeFacts:
    """Write the types and shapes of the main graph's computed values; returns what is known of them.

    `partly`: own rules are enough where they give all types, though some shapes stay unknown. The declared outputs may
    change too. Names of dimensions that are recorded on computed values are forgotten first.
    """
    if _write_types(model):
        forget_names(model)
        facts = ShapeFacts(model)
        if partly or facts.are_complete(model):
            _write_shapes(model, facts)
            return facts
    infer_shapes(model)
    return ShapeFacts(model)


def _write_types(model: ir.Model) -> bool:
    """False, perhaps with some types written, where a node has no rule: of a type, or of a shape."""
    version = g.opset_of(model)
    types: dict[ir.DataType, ir.TensorType] = {}
    for node in model.graph:
        if not ShapeFacts.has_rule(node):
            return False
        rules = _rules(node.op_type, version)
        for index, value in enumerate(node.outputs):
            if not value.name:
                continue
            rule = None if rules is None else rules[min(index, len(rules) - 1)]
            found = _applied(rule, node)
            if found is None:
                return False
            value.type = types.get(found) or types.setdefault(found, ir.TensorType(found))
    return True


def _applied(rule: Rule, node: ir.Node) -> ir.DataType | None:
    if isinstance(rule, ir.DataType):
        return rule
    if isinstance(rule, str):
        found = g.attribute(node, rule, _IN_ATTRIBUTE[node.op_type][1])
        return found.dtype if isinstance(found, ir.TensorProtocol) else None if found is None else ir.DataType(found)
    for place in rule or ():
        value = g.input_of(node, place)
        if value is not None:
            return value.dtype if isinstance(value.type, ir.TensorType) else None
    return None


@functools.cache
def _rules(op_type: str, version: int) -> tuple[Rule, ...] | None:
    """Of every output of an operator of the standard domain; None where it has no schema of this version."""
    try:
        schema = onnx.defs.get_schema(op_type, version, "")
    except onnx.defs.SchemaError:
        return None
    inputs = [given.type_str for given in schema.inputs]
    single = {
        c.type_param_str: c.allowed_type_strs[0] for c in schema.type_constraints if len(c.allowed_type_strs) == 1
    }
    rules: list[Rule] = []
    for output in schema.outputs:
        places = tuple(place for place, kind in enumerate(inputs) if kind == output.type_str)
        known = _TENSOR.get(single.get(output.type_str, output.type_str))
        if known is not None:
            rules.append(known)
        elif places and output.is_homogeneous:
            rules.append(places)
        else:
            rules.append(_IN_ATTRIBUTE[op_type][0] if op_type in _IN_ATTRIBUTE else None)
    return tuple(rules) or None


def _write_shapes(model: ir.Model, facts: ShapeFacts) -> None:
    written: dict[int, list[int | ir.SymbolicDim]] = {}  # many values share one tuple
    for node in model.graph:
        for value in node.outputs:
            shape = facts.shape(value) if value.name else None
            if shape is None:
                continue
            sizes = written.get(id(shape))
            if sizes is None:
                sizes = written[id(shape)] = [size if isinstance(size, int) else _named(size) for size in shape]
            value.shape = ir.Shape(sizes)


def _named(size: Dim) -> ir.SymbolicDim:
    """A dimension that is one of the model's inputs keeps its name; what is computed from them has none."""
    (monomial, factor), *more = size.terms.items()
    plain = not more and factor == 1 and len(monomial) == 1 and is_name(monomial[0])
    return ir.SymbolicDim(monomial[0] if plain else None)
