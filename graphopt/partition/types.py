"""The types of all values that are known before a run, and the rewriting that shape arithmetic needs before a cut."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx.inliner
import onnx_ir as ir

from graphopt import model as models
from graphopt.graph import is_onnx, static_shape
from graphopt.partition.nodes import Nodes
from graphopt.runtime.onnxruntime_engine import output_types
from graphopt.targets.base import TensorType

LARGEST_CONSTANT = 1 << 16
"""Elements of a value that is stored rather than computed."""


def inlined(model: ir.Model) -> ir.Model:
    """The model without functions."""
    if not model.functions:
        return model
    return ir.from_proto(onnx.inliner.inline_local_functions(ir.to_proto(model)))


def known_types(model: ir.Model, work: Path) -> dict[str, TensorType]:
    """Types of values with static shapes, by ONNX's shape inference, as recorded in `model`, and for operators of other
    domains by ONNX Runtime's."""
    found: dict[str, TensorType] = {}
    unknown: list[ir.Value] = []
    for value in (*model.graph.inputs, *(v for node in model.graph for v in node.outputs if v.name)):
        shape = static_shape(value)
        if shape is not None and value.dtype is not None and isinstance(value.type, ir.TensorType):
            found[str(value.name)] = TensorType(str(value.dtype.numpy()), shape)
        elif value.producer() is not None:
            unknown.append(value)
    if any(not is_onnx(node) for node in model.graph) and unknown:
        exposed = model.clone()
        by_name = {v.name: v for node in exposed.graph for v in node.outputs}
        final = {v.name for v in exposed.graph.outputs}
        exposed.graph.outputs.extend(by_name[v.name] for v in unknown if v.name not in final)
        models.save(exposed, work / "types.onnx")
        for name, (dtype, shape) in output_types(work / "types.onnx").items():
            found.setdefault(name, TensorType(dtype, shape))
    return found


def record_types(model: ir.Model, types: Mapping[str, TensorType]) -> None:
    """Write down, in place, what is known of values of unknown shape."""
    for value in (v for node in model.graph for v in node.outputs):
        kind = types.get(str(value.name))
        if kind is not None and static_shape(value) is None:
            value.type = ir.TensorType(ir.DataType.from_numpy(np.dtype(kind.dtype)))
            value.shape = ir.Shape(kind.shape)


def store_constants(model: ir.Model, constants: Mapping[str, np.ndarray]) -> None:
    """Make initializers, in place, of values that depend on shapes only: a part knows the shapes of its inputs, not
    those of values in other parts. What depends on initializers alone stays computed."""
    graph = model.graph
    for node in Nodes.of(model).nodes:
        values = [v for v in node.outputs if v.name]
        known = [constants.get(str(v.name)) for v in values]
        if any(a is None or a.size > LARGEST_CONSTANT for a in known) or any(v.is_graph_output() for v in values):
            continue
        for old, array in zip(values, known, strict=True):
            assert array is not None
            name, old.name = str(old.name), None
            tensor = ir.Tensor(np.ascontiguousarray(array).reshape(array.shape), name=name)
            new = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
            graph.register_initializer(new)
            old.replace_all_uses_with(new)
        graph.remove(node, safe=True)
