"""ONNX's own shape inference on an `onnx_ir` model, without copying large weights through protobuf."""

from __future__ import annotations

import onnx
import onnx_ir as ir

from graphopt.checking import inferred

_LARGE_BYTES = 4096
"""Contents of larger initializers never decide a shape: only their types are handed over."""


def infer_shapes(model: ir.Model) -> None:
    """Write inferred types and shapes on the main graph's computed values; the declared outputs may change too.

    Symbolic dimensions recorded on computed values are forgotten first: exporters write names there that hold for one
    trace only. A model that inference refuses is left without inferred shapes.
    """
    forget_names(model)
    result = inferred(without_large(model))
    if result is None:
        return
    found = {info.name: info.type for info in (*result.graph.value_info, *result.graph.output)}
    for node in model.graph:
        for value in node.outputs:
            known = found.get(str(value.name))
            if known is None:
                continue
            if not known.HasField("tensor_type"):
                value.type = ir.serde.deserialize_type_proto_for_type(known)
                value.shape = ir.serde.deserialize_type_proto_for_shape(known) or value.shape
                continue
            if known.tensor_type.elem_type:
                value.type = ir.TensorType(ir.DataType(known.tensor_type.elem_type))
            if known.tensor_type.HasField("shape"):
                value.shape = ir.Shape([_dimension(d) for d in known.tensor_type.shape.dim])


def forget_names(model: ir.Model) -> None:
    """Symbolic dimensions recorded on computed values become unknown ones."""
    for node in model.graph:
        for value in node.outputs:
            if value.shape is not None and not value.shape.is_static():
                value.shape = ir.Shape([d if isinstance(d, int) else None for d in value.shape])


def _dimension(proto: onnx.TensorShapeProto.Dimension) -> int | ir.SymbolicDim:
    if proto.HasField("dim_value"):
        return proto.dim_value
    return ir.SymbolicDim(proto.dim_param or None)


def as_inferred(model: ir.Model) -> onnx.ModelProto:
    """What `infer_shapes` will hand over; the model stays as it is."""
    proto = without_large(model)
    for value in (*proto.graph.value_info, *proto.graph.output):
        for dimension in value.type.tensor_type.shape.dim:
            dimension.ClearField("dim_param")
    return proto


def without_large(model: ir.Model) -> onnx.ModelProto:
    """The model for ONNX's own tools, its large initializers listed as inputs: nothing of theirs is copied."""
    graph = model.graph
    initializers = list(graph.initializers.values())
    large = [
        v
        for v in initializers
        if v.const_value is not None and v.const_value.nbytes > _LARGE_BYTES and not v.is_graph_input()
    ]
    for value in large:
        del graph.initializers[str(value.name)]
        graph.inputs.append(value)
    try:
        return ir.to_proto(model)
    finally:
        for _ in large:
            graph.inputs.pop()
        graph.initializers.clear()
        for value in initializers:
            graph.register_initializer(value)
