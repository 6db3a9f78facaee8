"""Models of an opset or IR version that ONNX Runtime does not know: not yet, or not any more.

Kernels go back to opset 7. And ONNX is released before the runtime that runs it: a model stamped with the newer opset
usually uses nothing that is new in it. ONNX's own version converter says so, operator by operator: what it converts
computes the same.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import onnx
import onnx.inliner
import onnx.version_converter
import onnx_ir as ir

OLDEST_OPSET = 7
SURE_OPSET, SURE_IR_VERSION = 22, 10
"""Versions that every ONNX Runtime graphopt works with takes: models up to these are not looked at."""
_CONVERTED = "graphopt.converted"
_LARGEST_BYTES = 1 << 30
"""Of tensors: a larger model is left as it is, since the converter copies it through protobuf."""


def for_onnxruntime(model: ir.Model) -> ir.Model:
    """The model in a version that ONNX Runtime knows, where its own is not and converts; else as it is."""
    opset, ir_version = model.opset_imports.get("", 0), model.ir_version or 0
    if 0 < opset < OLDEST_OPSET:
        return _converted(model, OLDEST_OPSET)
    if opset <= SURE_OPSET and ir_version <= SURE_IR_VERSION:
        return model
    newest_opset, newest_ir_version = newest_versions()
    if opset > newest_opset:
        model = _converted(model, newest_opset)
    if (model.ir_version or 0) > newest_ir_version:
        model.ir_version = newest_ir_version
        model.meta[_CONVERTED] = True
    return model


def is_converted(model: ir.Model) -> bool:
    """Whether `for_onnxruntime` changed the model's version."""
    return bool(model.meta.get(_CONVERTED))


def _converted(model: ir.Model, opset: int) -> ir.Model:
    size = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    if size > _LARGEST_BYTES:
        return model
    ir.external_data.load_to_model(model)
    proto = ir.to_proto(model)
    if proto.functions:
        proto = onnx.inliner.inline_local_functions(proto)
    found = _through_converter(proto, opset)
    if found is None:  # what is new may be defined by what is not
        new = [("", name) for name in changed_since(proto, opset) if _is_defined(name)]
        try:
            expanded = onnx.inliner.inline_selected_functions(proto, new, False, True)
        except RuntimeError:
            return model  # the inliner wants types that nothing says
        found = _through_converter(expanded, opset) if new else None
    if found is None:
        return model  # ONNX Runtime will say what is too new
    converted = ir.from_proto(found)
    converted.meta[_CONVERTED] = True
    return converted


def _through_converter(proto: onnx.ModelProto, opset: int) -> onnx.ModelProto | None:
    """The model in another opset, valid there; None where an operator is new or means something else."""
    try:
        proto = onnx.version_converter.convert_version(proto, opset)
        onnx.checker.check_model(proto, full_check=True)
    except (RuntimeError, ValueError, onnx.checker.ValidationError, onnx.shape_inference.InferenceError):
        return None
    return proto


def _is_defined(op_type: str) -> bool:
    """Whether ONNX defines an operator by others."""
    schema: Any = onnx.defs.get_schema(op_type, "")
    return schema.has_function or schema.has_context_dependent_function


def changed_since(proto: onnx.ModelProto, opset: int) -> list[str]:
    """The operators of a model that are new after `opset`, or mean something else."""
    of_model = next((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), 0)
    own = {n.op_type for n in proto.graph.node if n.domain in ("", "ai.onnx") and onnx.defs.has(n.op_type, "")}
    return sorted(name for name in own if onnx.defs.get_schema(name, of_model, "").since_version > opset)


@lru_cache(maxsize=1)
def newest_versions() -> tuple[int, int]:
    """The newest opset of ONNX's own operators and the newest IR version that ONNX Runtime loads."""
    opset = next(v for v in range(onnx.defs.onnx_opset_version(), 0, -1) if _loads(v, SURE_IR_VERSION))
    return opset, next(v for v in range(int(onnx.IR_VERSION), 0, -1) if _loads(SURE_OPSET, v))


def _loads(opset: int, ir_version: int) -> bool:
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as state  # pyright: ignore[reportAttributeAccessIssue]

    helper = onnx.helper
    x, y = (helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "versions", [x], [y])
    opsets = [helper.make_opsetid("", opset)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=ir_version)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except (RuntimeError, state.Fail):
        return False
    return True
