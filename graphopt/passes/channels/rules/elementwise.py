"""Element by element, with broadcasting: what meets is kept or cut together, constants are sliced."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphopt import graph as g
from graphopt.passes.channels.dependency import ChannelGraph

ELEMENTWISE = (
    "Abs", "Acos", "Acosh", "Add", "And", "Asin", "Asinh", "Atan", "Atanh", "Cast", "Ceil", "Celu", "Clip", "Cos",
    "Cosh", "Div", "Dropout", "Elu", "Equal", "Erf", "Exp", "Floor", "Gelu", "Greater", "GreaterOrEqual", "HardSigmoid",
    "HardSwish", "Identity", "LeakyRelu", "Less", "LessOrEqual", "Log", "Max", "Mean", "Min", "Mish", "Mod", "Mul",
    "Neg", "Not", "Or", "PRelu", "Pow", "Reciprocal", "Relu", "Round", "Selu", "Shrink", "Sigmoid", "Sign", "Sin",
    "Sinh", "Softplus", "Softsign", "Sqrt", "Sub", "Sum", "Swish", "Tan", "Tanh", "ThresholdedRelu", "Where", "Xor",
)  # fmt: skip


def elementwise(graph: ChannelGraph, node: ir.Node) -> None:
    """Operands are aligned at their last axes; all that carry labels must carry them along the same one."""
    operands = [(index, value) for index, value in enumerate(node.inputs) if value is not None]
    shapes = {index: graph.shape(value) for index, value in operands}
    found = {
        index: (graph.carried[value].axis - len(shape), graph.carried[value].labels)
        for index, value in operands
        if value in graph.carried and (shape := shapes[index]) is not None
    }
    if not found:
        graph.freeze_inputs(node, f"the shapes that meet in {g.label(node)!r} are not known")
        return
    axis, labels = next(iter(found.values()))
    rank = max((len(shape) for shape in shapes.values() if shape is not None), default=0)
    if any(a != axis or len(each) != len(labels) for a, each in found.values()):
        graph.freeze_inputs(node, f"channels along different axes meet in {g.label(node)!r}")
        return
    for _, other in found.values():
        graph.classes.join_arrays(labels, other)
    for index, value in operands:
        if index not in found:
            _meet(graph, node, index, value, axis, labels)
    graph.carry(node.outputs[0], rank + axis, labels, rank)


def _meet(graph: ChannelGraph, node: ir.Node, index: int, value: ir.Value, axis: int, labels: np.ndarray) -> None:
    """An operand without labels: broadcast along the axis, or a constant with a slice a channel, or in the way."""
    shape, array = graph.shape(value), g.constant_of(value)
    if array is not None:
        if array.ndim >= -axis and array.shape[axis] != 1:
            graph.slice(node, index, axis, labels)
    elif shape is None or (len(shape) >= -axis and shape[axis] != 1):
        graph.classes.freeze(labels, f"{value.name!r}, which {g.label(node)!r} reads too, has no channels to cut")
