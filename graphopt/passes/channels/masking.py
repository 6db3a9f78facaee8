"""The model that a plan's result must equal: all its channels are there, those to cut are zero."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphopt import graph as g
from graphopt.passes.channels.plan import Plan


def masked_model(plan: Plan) -> ir.Model:
    """A copy of the model in which every value that carries channels has those to cut replaced by zero.

    Needs opset 9 (Where: a product with zero would keep an infinity).
    """
    masks = {}
    for node in plan.channels.model.graph:
        for value in node.outputs:
            cut = plan.kept_of(value)
            if cut is not None:
                masks[value.name] = cut
    model = plan.channels.model.clone()
    graph = model.graph
    for node in list(graph):
        for value in node.outputs:
            if value.name not in masks:
                continue
            axis, stays = masks[value.name]
            rank = len(plan.channels.shape(value) or ())
            mask = g.add_initializer(graph, "mask", stays.reshape([-1 if a == axis else 1 for a in range(rank)]))
            dtype = value.dtype.numpy() if value.dtype is not None else np.dtype(np.float32)
            zero = g.add_initializer(graph, "zero", np.zeros((), dtype))
            masked = ir.node("Where", [mask, value, zero])
            masked.outputs[0].name = g.fresh_name(graph, f"{value.name}_masked")
            masked.outputs[0].type, masked.outputs[0].shape = value.type, value.shape
            graph.insert_after(node, masked)
            for usage in list(value.uses()):
                if usage.node is not masked:
                    usage.node.replace_input_with(usage.idx, masked.outputs[0])
    return model
