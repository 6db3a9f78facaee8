"""ONNX nodes as the importer reads them, and the errors that name one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import onnx

from graphopt.errors import TargetError

if TYPE_CHECKING:
    from graphopt.targets.relax.values import Value

STAYS = "the model can stay on ONNX Runtime"


def operator(node: onnx.NodeProto) -> str:
    """The type, with its domain where that is not ONNX's own."""
    return node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}"


def label(node: onnx.NodeProto) -> str:
    return node.name or node.output[0]


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for attribute in node.attribute:
        value = onnx.helper.get_attribute_value(attribute)
        found[attribute.name] = tuple(value) if isinstance(value, list) else value
    return found


def without_empty_axes(node: onnx.NodeProto, inputs: Sequence[Value | None]) -> list[Value | None]:
    """A reduction's operands, without axes that are empty: that means what none at all mean, and TVM has no constants
    of no elements."""
    if node.op_type.startswith("Reduce") and len(inputs) > 1:
        axes = inputs[1]
        if axes is not None and axes.const is not None and not axes.const.size:
            return [inputs[0], None]
    return list(inputs)


def dynamic(node: onnx.NodeProto) -> TargetError:
    return TargetError(
        f"{node.op_type}: its output shape depends on data, and compiled models have static shapes",
        node=label(node),
        hint=STAYS,
    )


def refused(node: onnx.NodeProto, error: Exception | str) -> TargetError:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = next((line for line in lines if "Check failed" in line or "rror" in line), lines[-1] if lines else "")
    return TargetError(
        f"TVM cannot import {node.op_type}: {reason[:200] or type(error).__name__}",
        node=label(node),
        hint=STAYS,
    )
