"""Forms of operators that TVM's importer takes and computes wrongly, or cannot compile: refused by name.

Found by ONNX's own backend tests (`benchmarks/backend_suite.py`). A wrong number is never the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import onnx

from graphopt.targets.relax.values import Value

Rule = Callable[[dict[str, Any], Sequence[Value | None], int, onnx.NodeProto], str | None]


def reason(node: onnx.NodeProto, inputs: Sequence[Value | None], opset: int) -> str | None:
    """Why a node must not be compiled; None where it may be."""
    rule = _RULES.get(node.op_type)
    if rule is None:
        return None
    found = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    found = {name: value.decode() if isinstance(value, bytes) else value for name, value in found.items()}
    return rule(found, inputs, opset, node)


def _always(why: str) -> Rule:
    return lambda attributes, inputs, opset, node: why


def _batch_norm(attributes, inputs, opset, node) -> str | None:
    if attributes.get("training_mode", 0) or (opset < 9 and len([o for o in node.output if o]) > 1):
        return "training mode"
    return None


def _dropout(attributes, inputs, opset, node) -> str | None:
    training, ratio = (_const(inputs, i) for i in (2, 1))
    if len(inputs) > 2 and inputs[2] is not None and training is None:
        return "whether it trains is known at run time only"
    if training is not None and training.any() and (ratio is None or ratio.any()):
        return "training mode: which elements it drops is not defined"
    return None


def _p_relu(attributes, inputs, opset, node) -> str | None:
    data, slope = (value.shape for value in inputs[:2])
    fits = len(slope) <= len(data) and all(a in (1, b) for a, b in zip(slope[::-1], data[::-1], strict=False))
    one_a_channel = len(slope) == 1 and len(data) > 2 and slope[0] == data[1]
    return None if fits or one_a_channel else f"a slope {list(slope)} does not broadcast to {list(data)}"


def _roi_align(attributes, inputs, opset, node) -> str | None:
    return "mode max" if attributes.get("mode", "avg") == "max" else None


def _of_type(*dtypes: str) -> Rule:
    def rule(attributes, inputs, opset, node) -> str | None:
        return f"of {inputs[0].dtype}" if inputs[0] is not None and inputs[0].dtype in dtypes else None

    return rule


def _empty(attributes, inputs, opset, node) -> str | None:
    shape = inputs[0].shape if inputs and inputs[0] is not None else None
    extremes = ("ReduceMax", "ReduceMin")
    if inputs and inputs[0] is not None and inputs[0].dtype == "bool" and node.op_type not in extremes:
        return "of bool"
    return "of a tensor with no elements" if shape is not None and 0 in shape else None


def _const(inputs: Sequence[Value | None], index: int) -> Any:
    value = inputs[index] if len(inputs) > index else None
    return None if value is None else value.const


_RULES: Mapping[str, Rule] = {
    "BatchNormalization": _batch_norm,
    "Dropout": _dropout,
    "PRelu": _p_relu,
    **dict.fromkeys(
        ("ReduceMax", "ReduceMin", "ReduceSum", "ReduceMean", "ReduceProd", "ReduceL1", "ReduceL2", "ReduceLogSum",
         "ReduceLogSumExp", "ReduceSumSquare", "ArgMax", "ArgMin"),
        _empty,
    ),
    "RoiAlign": _roi_align,
    "TopK": _of_type("uint64", "uint32", "uint16"),
    **dict.fromkeys(
        ("SequenceAt", "SequenceConstruct", "SequenceEmpty", "SequenceErase", "SequenceInsert", "SequenceLength",
         "SplitToSequence", "ConcatFromSequence"),
        _always("sequences of tensors"),
    ),
}  # fmt: skip
