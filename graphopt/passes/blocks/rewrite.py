"""Putting one convolution where a residual block was. What reads the block's output sees no difference."""

from __future__ import annotations

import onnx_ir as ir

from graphopt import graph as g
from graphopt.passes.blocks.find import Block
from graphopt.passes.blocks.fit import Fit
from graphopt.passes.taking_over import take_over

SUFFIX = "_merged"
"""The new node is called ADD_merged."""


def merge(model: ir.Model, block: Block, found: Fit) -> None:
    """Replace the block in `model`, a clone of the one it was found in, where nothing inside it has changed."""
    graph = model.graph
    makers = {value.name: node for node in graph for value in node.outputs if value.name}
    add = makers[block.output]
    inside = [makers[name] for name in block.inner]
    entry = next(v for node in (add, *inside) for v in node.inputs if v is not None and v.name == block.entry)
    weights = g.add_initializer(graph, f"{block.name}{SUFFIX}_weight", found.weights)
    bias = g.add_initializer(graph, f"{block.name}{SUFFIX}_bias", found.bias)
    kernel = found.weights.shape[2]
    attributes = {"kernel_shape": [kernel] * 2, "pads": [kernel // 2] * 4, "strides": [1, 1], "dilations": [1, 1]}
    name = g.fresh_name(graph, f"{block.name}{SUFFIX}")
    conv = ir.node("Conv", [entry, weights, bias], {**attributes, "group": 1}, name=name)
    conv.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    graph.insert_before(add, conv)
    take_over(graph, add, conv.outputs[0])
    fed = {value for node in inside for value in node.inputs if value is not None}
    for node in reversed(inside):
        graph.remove(node, safe=True)
    for value in fed:
        node = value.producer()
        if node is not None and node.graph is graph and g.is_onnx(node, "Constant") and not value.uses():
            graph.remove(node, safe=True)
    g.remove_unused_initializers(graph)
