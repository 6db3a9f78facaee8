"""Raising a model to the operator set that a fused operator needs, node by node, without copying a weight.

A node whose operator has the same definition in both sets stays as it is. Where the definition changed, it stays if the
change only added types, attributes or inputs that are optional (`_UNCHANGED`), or is written the new way: axes of
Squeeze, Unsqueeze and ReduceSum and sizes of Split as inputs (opset 13), axes of other reductions too (18), Softmax
along its axis alone (13; only where that is the last, where it means the same). Anything else, an operator whose
meaning moved, keeps the model where it is; so does a model with functions of its own, and one below opset 11, where
many did.
"""

from __future__ import annotations

import functools

import numpy as np
import onnx
import onnx_ir as ir

from graphopt import graph as g

OLDEST = 11
_REDUCTIONS = frozenset(
    {"ReduceMax", "ReduceMin", "ReduceMean", "ReduceProd", "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp",
     "ReduceSumSquare"}
)  # fmt: skip
_AXES_MOVED = {"Squeeze": 13, "Unsqueeze": 13, "ReduceSum": 13, **dict.fromkeys(_REDUCTIONS, 18)}
"""The opset from which on axes are an input."""
_ALONG_AXIS = frozenset({"Softmax", "LogSoftmax", "Hardmax"})
_UNCHANGED = frozenset(
    {
        "Abs", "Acos", "Acosh", "Add", "And", "ArgMax", "ArgMin", "Asin", "Asinh", "Atan", "Atanh", "AveragePool",
        "BatchNormalization", "BitShift", "Cast", "CastLike", "Ceil", "Clip", "Compress", "Concat", "Constant",
        "ConstantOfShape", "Conv", "ConvInteger", "ConvTranspose", "Cos", "Cosh", "CumSum", "DepthToSpace",
        "DequantizeLinear", "Div", "Dropout", "DynamicQuantizeLinear", "Einsum", "Elu", "Equal", "Erf", "Exp",
        "Expand", "EyeLike", "Flatten", "Floor", "GRU", "Gather", "GatherElements", "GatherND", "Gelu", "Gemm",
        "GlobalAveragePool", "GlobalMaxPool", "Greater", "GreaterOrEqual", "HardSigmoid", "HardSwish",
        "Identity", "InstanceNormalization", "IsInf", "IsNaN", "LRN", "LSTM", "LayerNormalization", "LeakyRelu",
        "Less", "LessOrEqual", "Log", "MatMul", "MatMulInteger", "Max", "MaxPool", "Mean", "Min",
        "Mish", "Mod", "Mul", "Multinomial", "Neg", "NonMaxSuppression", "NonZero", "Not", "OneHot", "Or", "PRelu",
        "Pad", "Pow", "QLinearConv", "QLinearMatMul", "QuantizeLinear", "RNN", "RandomNormal", "RandomNormalLike",
        "RandomUniform", "RandomUniformLike", "Range", "Reciprocal", "Relu", "Reshape", "Resize",
        "ReverseSequence", "Round", "ScatterElements", "ScatterND", "Selu", "Shape", "Sigmoid", "Sign", "Sin", "Sinh",
        "Size", "Slice", "Softplus", "Softsign", "SpaceToDepth", "Sqrt", "Sub", "Sum", "Tan",
        "Tanh", "ThresholdedRelu", "Tile", "TopK", "Transpose", "Trilu", "Unique", "Where", "Xor",
    }
)  # fmt: skip
"""From opset 11 to 24: types, attributes and optional inputs were added, nothing else."""


def refusal(model: ir.Model, version: int) -> str | None:
    """Why the model cannot be raised to opset `version`; None where it can be, or is there already.

    Ranks tell whether an axis is the last: infer shapes first.
    """
    current = g.opset_of(model)
    if current >= version:
        return None
    what = f"opset {current} is not raised to {version}"
    if current < OLDEST:
        return f"{what}: it is below {OLDEST}"
    if model.functions:
        return f"{what}: the model has functions of its own"
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if not g.is_onnx(node) or _since(node.op_type, current) == _since(node.op_type, version):
            continue
        if node.op_type in _AXES_MOVED or node.op_type == "Split":
            if node.graph is not model.graph:
                return f"{what}: {node.op_type} {g.label(node)!r} in a subgraph is written another way there"
        elif g.holds_subgraphs(node):
            continue  # If, Loop, Scan: types were added
        elif node.op_type not in _UNCHANGED | _ALONG_AXIS or _moved(node, current, version):
            return f"{what}: {node.op_type} {g.label(node)!r} means something else there"
    return None


def raise_opset(model: ir.Model, version: int) -> None:
    """Raise a model that `refusal` has nothing against."""
    current = g.opset_of(model)
    if current >= version:
        return
    for node in list(model.graph):
        if not g.is_onnx(node):
            continue
        moved = _AXES_MOVED.get(node.op_type)
        if moved is not None and current < moved <= version:
            _to_input(model, node, "axes")
        elif node.op_type == "Split" and current < 13 <= version:
            _to_input(model, node, "split")
        elif node.op_type in _ALONG_AXIS and current < 13 <= version:
            node.attributes["axis"] = ir.AttrInt64("axis", -1)
        elif node.op_type == "Dropout" and current < 12 <= version:
            node.attributes.pop("ratio", None)  # nothing is dropped in inference
        if node.op_type == "Split" and current < 18 <= version and g.input_of(node, 1) is None:
            node.attributes["num_outputs"] = ir.AttrInt64("num_outputs", len(node.outputs))
    model.opset_imports["" if "" in model.opset_imports else "ai.onnx"] = version
    wanted = onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", version)])
    model.ir_version = max(model.ir_version or 0, wanted)


def _to_input(model: ir.Model, node: ir.Node, name: str) -> None:
    if name in node.attributes:
        numbers = np.array(g.attribute(node, name, ()), np.int64)
        del node.attributes[name]
        node.resize_inputs(2)
        node.replace_input_with(1, g.add_initializer(model.graph, f"{node.outputs[0].name}_{name}", numbers))


def _moved(node: ir.Node, current: int, version: int) -> bool:
    """Changes of meaning in operators of `_UNCHANGED` that some attributes bring."""
    if node.op_type == "BatchNormalization" and current < 14:
        return len(node.outputs) > 1
    if node.op_type in _ALONG_AXIS and current < 13 <= version:
        shape, axis = node.inputs[0].shape if node.inputs[0] is not None else None, g.attribute(node, "axis", 1)
        return axis != -1 and (shape is None or axis != len(shape) - 1)
    if node.op_type == "AveragePool" and current < 19 <= version:  # windows over the edge are counted otherwise
        return bool(g.attribute(node, "ceil_mode", 0))
    if node.op_type == "Resize" and current < 19 <= version:
        return g.attribute(node, "coordinate_transformation_mode", "half_pixel") == "tf_crop_and_resize"
    return False


@functools.cache
def _since(op_type: str, version: int) -> int:
    """The opset whose definition of an operator holds in `version`; 0 where there is none."""
    try:
        return onnx.defs.get_schema(op_type, version, "").since_version
    except onnx.defs.SchemaError:
        return 0
