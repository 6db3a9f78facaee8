"""Sigmoid linear units.

    x * Sigmoid(a x)  =  Swish(x, alpha=a)

Conditions: float32; opset 24 exactly. ONNX Runtime 1.31 has no kernel for Swish: it expands the function, for models of
opset 24 only, into a product with alpha more than the original had, and then does not find its own fused form of
x * Sigmoid(x) any more. So this is done only where opset 24 is asked for (max_opset=24).
Reference: Elfwing et al., Sigmoid-Weighted Linear Units, Neural Networks 107, 2018; Ramachandran et al., Searching for
Activation Functions, arXiv:1710.05941.
"""

from __future__ import annotations

import onnx_ir as ir

from graphopt.passes.fusion.algebra import product
from graphopt.passes.fusion.pattern import Fusion, View, Writer, is_float, reader, same_shape

ANCHORS = ("Sigmoid",)
OPSET = 24


def match(node: ir.Node, view: View) -> Fusion | None:
    times = reader(node.outputs[0], "Mul")
    if times is None or not is_float(node.outputs[0]) or view.opset > OPSET:
        return None
    x = times.inputs[1] if times.inputs[0] is node.outputs[0] else times.inputs[0]
    if x is None or x is node.outputs[0] or not same_shape(view, [x, times.outputs[0]]):
        return None
    inside = product(node.inputs[0], {x})
    if inside.powers != {x: 1} or inside.arrays:
        return None
    attributes = {} if inside.constant == 1 else {"alpha": inside.constant}

    def build(writer: Writer) -> ir.Value:
        return writer.node("Swish", [x], attributes)

    return Fusion(times, frozenset([node, times, *inside.nodes]), OPSET, build)
