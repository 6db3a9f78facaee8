"""ONNX nodes as the importer reads them, and the errors that name one."""

from __future__ import annotations

from typing import Any

import onnx

from graphopt.errors import TargetError

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
