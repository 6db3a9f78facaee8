"""Gaussian error linear units.

    x / 2 * (1 + Erf(x / sqrt(2)))                                    =  Gelu(x)
    x / 2 * (1 + Tanh(sqrt(2/pi) * (x + 0.044715 x^3)))               =  Gelu(x, approximate=tanh)

Conditions: float32; the factors in any order; each constant within four units in the last place of the number meant.
Reference: Hendrycks and Gimpel, Gaussian Error Linear Units, arXiv:1606.08415.
"""

from __future__ import annotations

import math
from functools import partial

import onnx_ir as ir

from graphopt.passes.fusion.algebra import product
from graphopt.passes.fusion.pattern import Fusion, View, Writer, is_float, near, producer, reader, same_shape, scalar

ANCHORS = ("Erf", "Tanh")
OPSET = 20
_MOST_FACTORS = 3


def match(node: ir.Node, view: View) -> Fusion | None:
    if not is_float(node.outputs[0]):
        return None
    inner = _inside_erf(node) if node.op_type == "Erf" else _inside_tanh(node)
    plus = reader(node.outputs[0], "Add")
    if inner is None or plus is None:
        return None
    x, nodes = inner
    one = scalar(plus.inputs[1] if plus.inputs[0] is node.outputs[0] else plus.inputs[0])
    if one != 1:
        return None
    top: ir.Node | None = plus
    for _ in range(_MOST_FACTORS):
        top = reader(top.outputs[0], "Mul", "Div")
        if top is None:
            return None
        whole = product(top.outputs[0], {x, plus.outputs[0]})
        if whole.is_of(0.5, {x: 1, plus.outputs[0]: 1}, near) and same_shape(view, [x, top.outputs[0]]):
            form = {} if node.op_type == "Erf" else {"approximate": "tanh"}
            group = frozenset([node, plus, *nodes, *whole.nodes])
            return Fusion(top, group, OPSET, partial(_build, x, form))
    return None


def _build(x: ir.Value, form: dict[str, str], writer: Writer) -> ir.Value:
    return writer.node("Gelu", [x], form)


def _inside_erf(node: ir.Node) -> tuple[ir.Value, set[ir.Node]] | None:
    """x of Erf(x / sqrt(2))."""
    scaled = producer(node.inputs[0], "Mul", "Div")
    for x in scaled.inputs if scaled is not None else ():
        if x is not None and product(node.inputs[0], {x}).is_of(math.sqrt(0.5), {x: 1}, near):
            return x, {*product(node.inputs[0], {x}).nodes}
    return None


def _inside_tanh(node: ir.Node) -> tuple[ir.Value, set[ir.Node]] | None:
    """x of Tanh(sqrt(2/pi) * (x + 0.044715 x^3))."""
    outer = product(node.inputs[0], ())
    if len(outer.powers) != 1 or not near(outer.constant, math.sqrt(2 / math.pi)) or outer.arrays:
        return None
    ((total, power),) = outer.powers.items()
    plus = producer(total, "Add")
    if plus is None or power != 1:
        return None
    for x, cubic in (plus.inputs, plus.inputs[::-1]):
        if x is None:
            continue
        inner = product(cubic, {x})
        if inner.is_of(0.044715, {x: 3}, near):
            return x, {*outer.nodes, plus, *inner.nodes}
    return None
