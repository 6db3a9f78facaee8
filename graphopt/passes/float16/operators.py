"""Which operators can compute in float16, and which must not."""

from __future__ import annotations

import onnx
import onnx_ir as ir

from graphopt import graph as g
from graphopt.passes.float16.narrow import FEW, narrow

KEPT = frozenset({
    # sums of many terms, and means and variances made of them
    "Softmax", "LogSoftmax", "LayerNormalization", "InstanceNormalization", "GroupNormalization", "RMSNormalization",
    "BatchNormalization", "LpNormalization", "MeanVarianceNormalization", "LRN", "GlobalAveragePool", "GlobalLpPool",
    "ReduceMean", "ReduceSum", "ReduceL1", "ReduceL2", "ReduceProd", "ReduceSumSquare", "ReduceLogSum",
    "ReduceLogSumExp", "CumSum", "Mean", "Sum", "NegativeLogLikelihoodLoss", "SoftmaxCrossEntropyLoss",
    # the same, carried from step to step
    "GRU", "LSTM", "RNN",
    # results that leave the range of float16 for inputs well inside it
    "Exp", "Log", "Pow", "Sqrt", "Reciprocal", "Softplus",
    # decisions, which a rounded operand turns over
    "Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Floor", "Ceil", "Round", "Mod", "NonMaxSuppression",
    # their type is an attribute, or they are about types
    "Cast", "CastLike", "Constant", "ConstantOfShape", "Range", "EyeLike", "RandomNormal", "RandomNormalLike",
    "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial",
    "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul",
})  # fmt: skip
"""Operators that stay in float32."""
FLOAT32_INPUTS = {"Resize": (1, 2), "Upsample": (1,)}
"""Inputs that stay float32 in operators that convert: regions and scales of resizing."""
READS_ANY = frozenset({"Shape", "Size", "Cast"})
"""Operators whose result is the same whichever of the two types they read."""


class KeepsFloat32(Exception):
    """Why a node stays in float32; empty for one that has nothing to do with it."""


def convertible(node: ir.Node, opset: int) -> tuple[list[int], list[int]]:
    """Indices of the inputs and outputs that become float16. Raises KeepsFloat32."""
    if not any(v is not None and v.dtype is ir.DataType.FLOAT for v in (*node.inputs, *node.outputs)):
        raise KeepsFloat32("")
    if not g.is_onnx(node):
        raise KeepsFloat32(f"an operator of {node.domain}")
    if node.op_type in READS_ANY:
        raise KeepsFloat32("")
    if node.op_type in KEPT:
        raise KeepsFloat32(f"{node.op_type} needs float32")
    if g.holds_subgraphs(node):
        raise KeepsFloat32("what it holds stays in float32")
    try:
        schema = onnx.defs.get_schema(node.op_type, opset, "")
    except onnx.defs.SchemaError:
        raise KeepsFloat32(f"{node.op_type} is unknown in opset {opset}") from None
    allowed = {each.type_param_str: each.allowed_type_strs for each in schema.type_constraints}
    found: list[list[int]] = []
    for values, formals in ((node.inputs, schema.inputs), (node.outputs, schema.outputs)):
        indices = []
        for index, value in enumerate(values):
            if value is None or value.dtype is not ir.DataType.FLOAT:
                continue
            kind = formals[min(index, len(formals) - 1)].type_str  # a variadic one comes last
            if kind == "tensor(float)" or (values is node.inputs and index in FLOAT32_INPUTS.get(node.op_type, ())):
                continue
            if "tensor(float16)" not in allowed.get(kind, ()):
                raise KeepsFloat32(f"{node.op_type} has no float16 form in opset {opset}")
            indices.append(index)
        found.append(indices)
    for index in found[0]:
        array = g.constant_of(node.inputs[index])
        if array is not None and array.size < FEW and not narrow(array).keeps_its_range:
            raise KeepsFloat32(f"its constant {node.inputs[index].name!r} is beyond the range of float16")  # pyright: ignore[reportOptionalMemberAccess]
    if not found[0] and not found[1]:
        raise KeepsFloat32("")
    return found[0], found[1]


def counting_nodes(graph: ir.Graph) -> set[ir.Node]:
    """Nodes that compute with numbers made of integers (sizes, positions) and constants alone: float16 holds no integer
    beyond 2048 for sure."""
    counts: set[ir.Value] = set()
    found: set[ir.Node] = set()
    for node in graph:
        source = node.inputs[0] if node.inputs else None
        if node.op_type in ("Cast", "Range", "ConstantOfShape"):
            integer = source is not None and source.dtype is not None and source.dtype.is_integer()
            if integer or node.op_type != "Cast":
                counts.update(node.outputs)
            continue
        floats = [v for v in node.inputs if v is not None and v.dtype is ir.DataType.FLOAT and g.constant_of(v) is None]
        if floats and all(v in counts for v in floats):
            counts.update(node.outputs)
            found.add(node)
    return found
