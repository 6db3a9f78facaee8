"""A layer found in one model, in a copy of that model."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from graphopt.passes.quantization.placement import Layer, output_of


def copy_with(model: ir.Model) -> tuple[ir.Model, Callable[[ir.Node], ir.Node]]:
    """A copy of `model` and what finds a node's counterpart in it (names are not always unique, places are)."""
    copy = model.clone()
    places = dict(zip(model.graph, copy.graph, strict=True))
    return copy, places.__getitem__


def layer_in(counterpart: Callable[[ir.Node], ir.Node], layer: Layer) -> Layer:
    """`layer` of the original, in the copy."""
    bias = None if layer.bias is None else (counterpart(layer.bias[0]), layer.bias[1])
    node = counterpart(layer.node)
    behind = node if layer.node.op_type != "MatMul" or bias is None else bias[0]
    return Layer(node, layer.weight_index, layer.channel_axis, output_of(behind), bias)
