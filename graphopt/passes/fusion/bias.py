"""A constant added to each channel of a Conv, or to each column of a product of matrices.

    Conv(x, w) + b                =  Conv(x, w, b)
    MatMul(x, w) + b              =  Gemm(x, w, b)

Conditions: b constant, a number for each channel or one for all; the weights constant; for Gemm two matrices (a stack
of them has no Gemm) and opset 7 or later.
Reference: onnxruntime/core/optimizer/matmul_add_fusion.cc and conv_add_fusion.cc, which do the same when a model loads.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphopt import graph as g
from graphopt.passes.fusion.pattern import Fusion, View, Writer, is_float, producer

ANCHORS = ("Add",)
OPSET = 7


def match(node: ir.Node, view: View) -> Fusion | None:
    for data, other in ((0, 1), (1, 0)):
        linear, bias = producer(node.inputs[data], "Conv", "ConvTranspose", "MatMul"), g.constant_of(node.inputs[other])
        if linear is None or bias is None or not is_float(*node.inputs) or g.constant_of(linear.inputs[1]) is None:
            continue
        return _product(node, linear, bias, view) if linear.op_type == "MatMul" else _conv(node, linear, bias, view)
    return None


def _conv(node: ir.Node, linear: ir.Node, bias: np.ndarray, view: View) -> Fusion | None:
    weight, shape = g.constant_of(linear.inputs[1]), view.shape(linear.outputs[0])
    if weight is None or shape is None or g.input_of(linear, 2) is not None or bias.ndim > len(shape):
        return None
    groups = g.attribute(linear, "group", 1)
    channels = weight.shape[0] if linear.op_type == "Conv" else weight.shape[1] * groups
    full = bias.reshape((1,) * (len(shape) - bias.ndim) + bias.shape)
    if any(size != 1 for axis, size in enumerate(full.shape) if axis != 1) or bias.size not in (1, channels):
        return None
    vector = np.broadcast_to(full.reshape(-1), (channels,)).copy()

    def build(writer: Writer) -> ir.Value:
        attributes = {name: a.value for name, a in linear.attributes.items()}
        return writer.node(linear.op_type, [*linear.inputs[:2], writer.constant("bias", vector)], attributes)

    return Fusion(node, frozenset([node, linear]), 1, build)


def _product(node: ir.Node, linear: ir.Node, bias: np.ndarray, view: View) -> Fusion | None:
    data, weight = view.shape(linear.inputs[0]), g.constant_of(linear.inputs[1])
    if data is None or weight is None or len(data) != 2 or weight.ndim != 2:
        return None
    columns = weight.shape[1]
    if bias.shape not in ((), (1,), (1, 1), (columns,), (1, columns)):
        return None
    vector = np.broadcast_to(bias.reshape(-1), (columns,)).copy()

    def build(writer: Writer) -> ir.Value:
        return writer.node("Gemm", [*linear.inputs, writer.constant("bias", vector)])

    return Fusion(node, frozenset([node, linear]), OPSET, build)
