"""Operators that ONNX defines by other operators, as these: what TVM has no converter for need not be refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx.inliner
from onnx import helper

PREFERRED = frozenset(
    {"Attention", "CastLike", "Clip", "LayerNormalization", "MeanVarianceNormalization", "RMSNormalization"}
)
"""Operators that TVM has a converter for that knows fewer forms, or computes some of them wrongly."""


def is_defined(op_type: str) -> bool:
    """Whether ONNX has a definition of the operator by others."""
    if not onnx.defs.has(op_type, ""):
        return False
    schema: Any = onnx.defs.get_schema(op_type, "")
    return schema.has_function or schema.has_context_dependent_function


def definition(
    node: onnx.NodeProto, types: Sequence[tuple[tuple[int, ...] | None, str] | None], opset: int
) -> onnx.GraphProto | None:
    """The nodes that a node stands for, in a graph whose inputs and outputs have the node's names; None: it has none.

    `types`: shape and element type of each input, None for those left out.
    """
    infos = {"": helper.make_tensor_value_info("", onnx.TensorProto.FLOAT, ())}  # the inliner wants a type of gaps, too
    for name, known in zip(node.input, types, strict=True):
        if name and known is not None:
            dtype = helper.np_dtype_to_tensor_dtype(np.dtype(known[1]))
            infos[name] = helper.make_tensor_value_info(name, dtype, known[0])
    if all(node.input):
        del infos[""]
    outputs = [helper.make_empty_tensor_value_info(name) for name in node.output if name]
    graph = helper.make_graph([_with_defaults(node, opset)], "definition", list(infos.values()), outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    try:
        made = onnx.inliner.inline_selected_functions(model, [("", node.op_type)], False, True)
    except (RuntimeError, ValueError):
        return None
    same = len(made.graph.node) == 1 and made.graph.node[0].op_type == node.op_type
    return None if same or not made.graph.node else made.graph


def _with_defaults(node: onnx.NodeProto, opset: int) -> onnx.NodeProto:
    """The node with the attributes that it leaves to their defaults: definitions refer to them."""
    try:
        schema: Any = onnx.defs.get_schema(node.op_type, opset, "")
    except onnx.defs.SchemaError:  # newer than the opset
        return node
    given = {a.name for a in node.attribute}
    missing = [a.default_value for name, a in schema.attributes.items() if name not in given and a.default_value.name]
    whole = onnx.NodeProto()
    whole.CopyFrom(node)
    whole.attribute.extend(missing)
    return whole
