"""Writing QuantizeLinear and DequantizeLinear into a graph."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx_ir as ir

from graphopt.graph import add_initializer, attribute, constant_of, fresh_name, label, remove_unused_initializers
from graphopt.passes.quantization.placement import Layer
from graphopt.passes.quantization.ranges import Encoding
from graphopt.passes.quantization.weights import quantize_weights


def insert_pair(graph: ir.Graph, value: ir.Value, encoding: Encoding, integer_nodes: Collection[ir.Node]) -> None:
    """Put value -> QuantizeLinear -> DequantizeLinear before its readers.

    All readers take the dequantized form where integer arithmetic makes the value (else the engine would have to
    compute it in float as well); only readers among `integer_nodes` do where float arithmetic makes it.
    """
    base = str(value.name)
    producer = value.producer()
    scale = add_initializer(graph, f"{base}_scale", np.asarray(encoding.scale, np.float32))
    zero = add_initializer(graph, f"{base}_zero_point", np.asarray(encoding.zero_point, encoding.dtype))
    readers = list(value.uses())
    if producer is None or producer not in integer_nodes:
        readers = [usage for usage in readers if usage.node in integer_nodes]
    quantize = ir.Node("", "QuantizeLinear", [value, scale, zero], name=fresh_name(graph, f"{base}_QuantizeLinear"))
    dequantize = ir.Node(
        "", "DequantizeLinear", [quantize.outputs[0], scale, zero], name=fresh_name(graph, f"{base}_DequantizeLinear")
    )
    _annotate(quantize.outputs[0], fresh_name(graph, f"{base}_quantized"), scale_dtype(encoding), value.shape)
    _annotate(dequantize.outputs[0], fresh_name(graph, f"{base}_dequantized"), ir.DataType.FLOAT, value.shape)
    if producer is None:
        graph.insert_before(graph[0], (quantize, dequantize))
    else:
        graph.insert_after(producer, (quantize, dequantize))
    for usage in readers:
        usage.node.replace_input_with(usage.idx, dequantize.outputs[0])
    if value.is_graph_output() and producer in integer_nodes:
        result = dequantize.outputs[0]
        for index, output in enumerate(graph.outputs):
            if output is value:
                graph.outputs[index] = result
        value.name = fresh_name(graph, f"{base}_before_rounding")
        result.name = base
        result.type, result.shape = value.type, value.shape


def insert_layer(graph: ir.Graph, layer: Layer, x: Encoding, *, limit: int, search: bool = False) -> None:
    """Replace the weights and bias of `layer` by integers and their DequantizeLinear."""
    node = layer.node
    weights, bias = layer_arrays(layer)
    quantized = quantize_weights(weights, layer.channel_axis, bias, x.scale, limit=limit, search=search)
    base = str(node.inputs[layer.weight_index].name)  # pyright: ignore[reportOptionalMemberAccess]
    _replace(graph, node, layer.weight_index, base, quantized.weights, quantized.scales, layer.channel_axis)
    if quantized.bias is not None:
        value = node.inputs[2] if len(node.inputs) > 2 else None
        base = str(value.name) if value is not None else f"{label(node)}_bias"
        if len(node.inputs) < 3:
            node.resize_inputs(3)
        _replace(graph, node, 2, base, quantized.bias, quantized.bias_scales, 0)
    if node.op_type == "Gemm":
        for name in ("alpha", "beta"):
            node.attributes.pop(name, None)
    remove_unused_initializers(graph)


def layer_arrays(layer: Layer) -> tuple[np.ndarray, np.ndarray | None]:
    """Float weights, and bias (channels,) or None; a Gemm's alpha and beta are folded in."""
    node = layer.node
    weights = constant_of(node.inputs[layer.weight_index])
    assert weights is not None
    bias = constant_of(node.inputs[2]) if len(node.inputs) > 2 else None
    if node.op_type == "Gemm":
        weights = weights * np.float32(attribute(node, "alpha", 1.0))
        if bias is not None:
            channels = weights.shape[layer.channel_axis]
            flat = bias.reshape(-1) * np.float32(attribute(node, "beta", 1.0))
            bias = np.ascontiguousarray(np.broadcast_to(flat, (channels,)))
    return weights, bias


def _replace(
    graph: ir.Graph, node: ir.Node, index: int, base: str, integers: np.ndarray, scales: np.ndarray, axis: int
) -> None:
    shape = ir.Shape(integers.shape)
    inputs = (
        add_initializer(graph, f"{base}_quantized", integers),
        add_initializer(graph, f"{base}_scale", scales),
        add_initializer(graph, f"{base}_zero_point", np.zeros(scales.shape, integers.dtype)),
    )
    name = fresh_name(graph, f"{base}_DequantizeLinear")
    dequantize = ir.Node("", "DequantizeLinear", inputs, [ir.AttrInt64("axis", axis)], name=name)
    _annotate(dequantize.outputs[0], fresh_name(graph, f"{base}_dequantized"), ir.DataType.FLOAT, shape)
    graph.insert_before(node, dequantize)
    node.replace_input_with(index, dequantize.outputs[0])


def scale_dtype(encoding: Encoding) -> ir.DataType:
    """ONNX's name of the encoding's integer type."""
    return ir.DataType.UINT8 if encoding.dtype == np.uint8 else ir.DataType.INT8


def _annotate(value: ir.Value, name: str, dtype: ir.DataType, shape: ir.Shape | None) -> None:
    value.name = name
    value.type = ir.TensorType(dtype)
    value.shape = None if shape is None else ir.Shape(list(shape))
