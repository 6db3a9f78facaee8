"""Raising a model to the opset that QuantizeLinear and DequantizeLinear need: a scale a channel 13, a block 21."""

from __future__ import annotations

import onnx
import onnx.version_converter
import onnx_ir as ir

from graphopt.errors import ModelError
from graphopt.model import check

NEEDED_OPSET = 13
IR_OF_OPSET = {13: 7, 21: 10}
"""The oldest IR version whose files may hold these opsets' types and operators."""


def opset_of(model: ir.Model) -> int:
    """The version of ONNX's own operators the model uses."""
    return model.opset_imports.get("", model.opset_imports.get("ai.onnx", 1))


def raise_opset(model: ir.Model, needed: int = NEEDED_OPSET) -> ir.Model | str:
    """The model at opset `needed` (13 or 21) or newer (itself where it is already), or why it cannot be raised.

    ONNX's version converter lacks adapters and is not to be trusted: the result must pass the checker, keep every
    input, output and initializer name, and keep the name of every value an unchanged node makes.
    """
    oldest_ir = IR_OF_OPSET[needed]
    if opset_of(model) >= needed:
        model.ir_version = max(model.ir_version or 0, oldest_ir)
        return model
    what = f"opset {opset_of(model)} cannot be raised to {needed}"
    before = ir.to_proto(model)
    before.ir_version = max(before.ir_version, oldest_ir)
    try:
        proto = onnx.version_converter.convert_version(before, needed)
    except (RuntimeError, ValueError, onnx.version_converter.ConvertError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        return f"{what}: {lines[0][:200]}"
    proto.ir_version = before.ir_version
    raised = ir.from_proto(proto)
    for kind, old, new in (
        ("input", [v.name for v in model.graph.inputs], [v.name for v in raised.graph.inputs]),
        ("output", [v.name for v in model.graph.outputs], [v.name for v in raised.graph.outputs]),
    ):
        if old != new:
            return f"{what}: the converter changed an {kind}"
    for old, new in zip(model.graph.outputs, raised.graph.outputs, strict=True):
        new.shape = old.shape  # the converter writes what it infers over the names of dynamic dimensions
    made = {v.name for node in raised.graph for v in node.outputs}
    lost = [v.name for node in model.graph for v in node.outputs if v.name not in made and v.uses()]
    if lost:
        return f"{what}: the converter lost the value {lost[0]}"
    try:
        check(raised, what)
    except ModelError as error:
        return str(error)
    return raised
