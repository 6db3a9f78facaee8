"""Writing QuantizeLinear and DequantizeLinear into a graph."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx_ir as ir

from graphopt.graph import attribute, constant_of, label
from graphopt.passes.quantization.placement import KEEPS_SCALE, Layer
from graphopt.passes.quantization.ranges import Encoding
from graphopt.passes.quantization.weights import Rounded, round_bias

SELF_QUANTIZED = frozenset({"Conv", "ConvTranspose", "Gemm"})
"""Float layers that ONNX Runtime quantizes by itself (a tensor, not a channel) between a DQ and a Q it finds."""


class Inserter:
    """Adds nodes and initializers under names that are new in `graph`."""

    def __init__(self, graph: ir.Graph, integer_nodes: Collection[ir.Node]):
        self.graph = graph
        self.integer_nodes = integer_nodes
        self.taken: set[str | None] = set(graph.initializers) | {value.name for value in graph.inputs}
        for node in graph.all_nodes():
            self.taken.add(node.name)
            self.taken.update(value.name for value in node.outputs)

    def fresh(self, wanted: str) -> str:
        """`wanted`, or `wanted_2`, `wanted_3`, ...: a name nothing has yet."""
        name, number = wanted, 1
        while name in self.taken:
            number += 1
            name = f"{wanted}_{number}"
        self.taken.add(name)
        return name

    def constant(self, wanted: str, array: np.ndarray) -> ir.Value:
        """A new initializer."""
        name = self.fresh(wanted)
        tensor = ir.Tensor(np.array(array, order="C"), name=name)
        value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.graph.register_initializer(value)
        return value

    def node(
        self, op_type: str, inputs: list[ir.Value], base: str, dtype: ir.DataType, shape, axis: int | None = None
    ) -> ir.Node:
        """A QuantizeLinear or DequantizeLinear, not yet in the graph."""
        attributes = [] if axis is None else [ir.AttrInt64("axis", axis)]
        node = ir.Node("", op_type, inputs, attributes, name=self.fresh(f"{base}_{op_type}"))
        suffix = "quantized" if op_type == "QuantizeLinear" else "dequantized"
        output = node.outputs[0]
        output.name = self.fresh(f"{base}_{suffix}")
        output.type = ir.TensorType(dtype)
        output.shape = None if shape is None else ir.Shape(list(shape))
        return node

    def pair(self, value: ir.Value, encoding: Encoding) -> None:
        """Put value -> QuantizeLinear -> DequantizeLinear before its readers.

        All readers take the dequantized form where integer arithmetic makes the value (else the engine would have to
        compute it in float as well); only integer readers do where float arithmetic makes it.
        """
        base = str(value.name)
        producer = value.producer()
        integer_made = producer is not None and producer in self.integer_nodes
        readers = [usage for usage in value.uses() if integer_made or usage.node in self.integer_nodes]
        scale = self.constant(f"{base}_scale", np.asarray(encoding.scale, np.float32))
        zero = self.constant(f"{base}_zero_point", np.asarray(encoding.zero_point, encoding.dtype))
        kind = ir.DataType.UINT8 if encoding.dtype == np.uint8 else ir.DataType.INT8
        quantize = self.node("QuantizeLinear", [value, scale, zero], base, kind, value.shape)
        inputs = [quantize.outputs[0], scale, zero]
        dequantize = self.node("DequantizeLinear", inputs, base, ir.DataType.FLOAT, value.shape)
        added = [quantize, dequantize]
        guarded = [usage for usage in readers if self._leads_to_float_layer(usage.node)]
        channels = _channels(value) if guarded else None
        if channels is None:
            guarded = []
        else:
            added.append(self._guard(quantize.outputs[0], base, encoding, value, channels))
        if producer is None:
            self.graph.insert_before(self.graph[0], added)
        else:
            self.graph.insert_after(producer, added)
        for usage in readers:
            source = added[-1] if usage in guarded else dequantize
            usage.node.replace_input_with(usage.idx, source.outputs[0])
        if integer_made and value.is_graph_output():
            self._become_output(value, dequantize.outputs[0])

    def _guard(self, quantized: ir.Value, base: str, encoding: Encoding, value: ir.Value, channels: int) -> ir.Node:
        """The same DequantizeLinear, written with one (equal) scale a channel.

        A float layer behind a per-tensor DequantizeLinear and before a QuantizeLinear would be quantized by ONNX
        Runtime on its own account, with one scale for all its weights; it leaves this form alone.
        """
        scales = self.constant(f"{base}_scale_by_channel", np.full(channels, encoding.scale, np.float32))
        zeros = self.constant(f"{base}_zero_point_by_channel", np.full(channels, encoding.zero_point, encoding.dtype))
        return self.node(
            "DequantizeLinear", [quantized, scales, zeros], f"{base}_float", ir.DataType.FLOAT, value.shape, 1
        )

    def _leads_to_float_layer(self, node: ir.Node) -> bool:
        """Whether `node` is a float layer, or only moves values to one: engines move a DequantizeLinear past those."""
        if node in self.integer_nodes:
            return False
        if node.op_type in SELF_QUANTIZED:
            return True
        if node.op_type not in KEEPS_SCALE:
            return False
        return any(self._leads_to_float_layer(usage.node) for output in node.outputs for usage in output.uses())

    def _become_output(self, value: ir.Value, result: ir.Value) -> None:
        name = value.name
        for index, output in enumerate(self.graph.outputs):
            if output is value:
                self.graph.outputs[index] = result
        value.name = self.fresh(f"{name}_before_rounding")
        result.name = name
        result.type, result.shape = value.type, value.shape

    def layer(self, layer: Layer, x: Encoding, scales: np.ndarray, rounded: Rounded) -> None:
        """Replace the weights and bias of `layer` by integers and their DequantizeLinear."""
        node = layer.node
        node.name = label(node)  # a nameless node is known by its output, which may be renamed
        _, bias = layer_arrays(layer)
        self._weights(node, layer.weight_index, rounded.integers, scales, layer.channel_axis)
        if layer.bias is not None:
            if rounded.shift is not None:
                bias = rounded.shift if bias is None else bias.astype(np.float64) + rounded.shift
            if bias is not None:
                bias_scales = (scales * x.scale).astype(np.float32)
                holder, index = layer.bias
                if len(holder.inputs) <= index:
                    holder.resize_inputs(index + 1)
                self._weights(holder, index, round_bias(bias, bias_scales), bias_scales, 0)
        if node.op_type == "Gemm":
            for name in ("alpha", "beta"):
                node.attributes.pop(name, None)

    def _weights(self, node: ir.Node, index: int, integers: np.ndarray, scales: np.ndarray, axis: int) -> None:
        old = node.inputs[index]
        base = str(old.name) if old is not None else f"{label(node)}_bias"
        inputs = [
            self.constant(f"{base}_quantized", integers),
            self.constant(f"{base}_scale", scales),
            self.constant(f"{base}_zero_point", np.zeros(scales.shape, integers.dtype)),
        ]
        dequantize = self.node("DequantizeLinear", inputs, base, ir.DataType.FLOAT, integers.shape, axis)
        self.graph.insert_before(node, dequantize)
        node.replace_input_with(index, dequantize.outputs[0])


def layer_arrays(layer: Layer) -> tuple[np.ndarray, np.ndarray | None]:
    """Float weights, and bias (channels,) or None; a Gemm's alpha and beta are folded in."""
    node = layer.node
    weights = constant_of(node.inputs[layer.weight_index])
    assert weights is not None
    bias = None
    if layer.bias is not None and len(layer.bias[0].inputs) > layer.bias[1]:
        bias = constant_of(layer.bias[0].inputs[layer.bias[1]])
    if node.op_type == "MatMul" and bias is not None:
        bias = bias.reshape(-1)
    if node.op_type == "Gemm":
        weights = weights * np.float32(attribute(node, "alpha", 1.0))
        if bias is not None:
            channels = weights.shape[layer.channel_axis]
            flat = bias.reshape(-1) * np.float32(attribute(node, "beta", 1.0))
            bias = np.ascontiguousarray(np.broadcast_to(flat, (channels,)))
    return weights, bias


def _channels(value: ir.Value) -> int | None:
    """The static size of axis 1."""
    if value.shape is None or len(value.shape) < 2:
        return None
    size = value.shape[1]
    return size if isinstance(size, int) else None
