"""Weights stored in float16 with a Cast to float32 behind each: half the bytes, float32 arithmetic."""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir

from graphopt import graph as g
from graphopt.passes.base import Skip
from graphopt.passes.float16.narrow import FEW, Losses, narrow

QUANTIZERS = ("QuantizeLinear", "DequantizeLinear", "MatMulNBits")
"""Engines want their scales as constants of the model, not computed."""


def store_weights(
    model: ir.Model, exclude: Collection[str], exclude_types: Collection[str], losses: Losses
) -> tuple[int, list[Skip]]:
    """How many float32 initializers are float16 now, and those left and why; what rounding lost joins `losses`."""
    graph, skipped, stored = model.graph, [], 0
    for name, value in list(graph.initializers.items()):
        array = g.constant_of(value)
        if value.dtype is not ir.DataType.FLOAT or array is None or array.size < FEW or value.is_graph_output():
            continue
        readers = [usage.node for usage in value.uses()]
        if not readers or any(node.op_type in QUANTIZERS for node in readers):
            continue
        left = next((n for n in readers if g.label(n) in exclude or n.op_type in exclude_types), None)
        if left is not None:
            skipped.append(Skip(name, f"{left.op_type} {g.label(left)!r}, which reads it, is excluded"))
            continue
        narrowed = narrow(array)
        losses.add(name, narrowed)
        half = g.add_initializer(graph, f"{name}_float16", narrowed.array)
        cast = ir.node("Cast", [half], {"to": ir.DataType.FLOAT.value}, name=g.fresh_name(graph, f"{name}_to_float32"))
        result = cast.outputs[0]
        result.type, result.shape = ir.TensorType(ir.DataType.FLOAT), value.shape
        value.replace_all_uses_with(result)
        del graph.initializers[name]
        result.name = name
        graph.insert_before(graph[0], cast)
        stored += 1
    return stored, skipped
