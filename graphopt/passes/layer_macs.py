"""Multiply-accumulates of every node, also where dimensions are dynamic: passes weigh layers against one another."""

from __future__ import annotations

import onnx_ir as ir

from graphopt import graph as g
from graphopt.errors import ModelError
from graphopt.inspection import inspect
from graphopt.model import fix_inputs, signature

GUESSED_SIZE = 256
"""Stands for dynamic dimensions behind the batch: only how layers compare matters."""


def layer_macs(model: ir.Model) -> dict[ir.Node, float]:
    """MACs of every node of the main graph but Constants.

    For dynamic dimensions a size is assumed: 1 for axis 0, else `GUESSED_SIZE`. A layer whose shape remains unknown
    counts as many MACs as it has weights.
    """
    nodes = [node for node in model.graph if node.op_type != "Constant"]
    shapes = {
        spec.name: tuple(
            d if isinstance(d, int) else 1 if axis == 0 else GUESSED_SIZE for axis, d in enumerate(spec.shape)
        )
        for spec in signature(model).inputs
        if not spec.is_static
    }
    try:
        counted = [layer.macs for layer in inspect(fix_inputs(model, shapes)).layers]
    except ModelError:  # sizes that contradict the model
        counted = [None] * len(nodes)
    return {node: float(_size(node) if macs is None else macs) for node, macs in zip(nodes, counted, strict=True)}


def _size(node: ir.Node) -> int:
    array = g.constant_of(g.input_of(node, 1))
    return 0 if array is None else array.size
