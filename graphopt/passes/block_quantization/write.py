"""Writing quantized weights into a graph: DequantizeLinear of opset 21, or MatMulNBits in an operator's place."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir

from graphopt.graph import attribute, constant_of, input_of, label, replace_value
from graphopt.passes.block_quantization.packing import pack_weights, pack_zeros
from graphopt.passes.block_quantization.rounding import Quantized
from graphopt.passes.quantization.insert import Inserter
from graphopt.passes.weight_layers import WeightLayer, weight_name, write_bias

CONTRIB = "com.microsoft"


def write_dequantize(inserter: Inserter, each: WeightLayer, done: Quantized) -> None:
    """Put the layer's weights behind DequantizeLinear (and a Reshape, for blocks along a whole row of a Conv).

    A Gemm's transposed weights (N, K) are stored as (K, N): engines have a product for blocks along the first axis, and
    would dequantize the others anew in each run.
    """
    where, base = done.layout, weight_name(each)
    turned = each.node.op_type == "Gemm" and attribute(each.node, "transB", 0) == 1

    def arranged(stored: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(stored.T) if turned else stored

    kind = ml_dtypes.uint4 if done.is_unsigned else ml_dtypes.int4 if done.bits == 4 else np.int8
    integers = arranged(where.integers(done.integers)).astype(kind)
    inputs = [
        inserter.constant(f"{base}_q", integers),
        inserter.constant(f"{base}_scale", arranged(where.by_block(done.grid.scales))),
    ]
    if done.is_unsigned:
        inputs.append(inserter.constant(f"{base}_zero", arranged(where.by_block(done.grid.zeros)).astype(kind)))
    axis = 1 - where.axis if turned else where.axis
    dequantize = inserter.node("DequantizeLinear", inputs, base, ir.DataType.FLOAT, integers.shape, axis)
    if where.size:
        dequantize.attributes.add(ir.AttrInt64("block_size", where.size))
    added = [dequantize]
    if where.stored != each.weights.shape:
        shape = inserter.constant(f"{base}_shape", np.array(each.weights.shape, np.int64))
        reshape = ir.node("Reshape", [dequantize.outputs[0], shape], name=inserter.fresh(f"{base}_Reshape"))
        result = reshape.outputs[0]
        result.name = inserter.fresh(f"{base}_reshaped")
        result.shape, result.type = ir.Shape(each.weights.shape), ir.TensorType(ir.DataType.FLOAT)
        added.append(reshape)
    inserter.graph.insert_before(each.node, added)
    write_bias(inserter, each, done.shift)
    for reader in (each.node, *each.sharers):
        reader.name = label(reader)
        reader.replace_input_with(each.layer.weight_index, added[-1].outputs[0])
        if turned:
            reader.attributes.pop("transB", None)


def write_matmulnbits(inserter: Inserter, each: WeightLayer, done: Quantized, block: int, accuracy_level: int) -> None:
    """Put MatMulNBits in the place of a Gemm or MatMul, under its name. `block`: at least 16, a power of two."""
    base, lift = weight_name(each), 0 if done.is_unsigned else 8
    integers, zeros = done.integers[0].astype(np.int16) + lift, done.grid.zeros[0] + lift
    columns, depth = integers.shape
    constants: list[ir.Value | None] = [
        inserter.constant(f"{base}_q", pack_weights(integers, zeros, block)),
        inserter.constant(f"{base}_scale", done.grid.scales[0].reshape(-1)),
    ]
    if done.is_unsigned:
        constants.append(inserter.constant(f"{base}_zero", pack_zeros(zeros).reshape(-1)))
    attributes = {"K": depth, "N": columns, "bits": 4, "block_size": block}
    if accuracy_level:
        attributes["accuracy_level"] = accuracy_level
    write_bias(inserter, each, done.shift)
    for reader in (each.node, *each.sharers):
        inputs = [reader.inputs[0], *constants]
        bias = _bias_row(inserter, reader, columns)
        if bias is not None:
            inputs += [None] * (5 - len(inputs)) + [bias]
        _put_in_place(inserter.graph, reader, ir.node("MatMulNBits", inputs, attributes, domain=CONTRIB))


def _put_in_place(graph: ir.Graph, old: ir.Node, new: ir.Node) -> None:
    graph.insert_before(old, new)
    before, after = old.outputs[0], new.outputs[0]
    after.shape, after.type = before.shape, before.type
    output_name, name = before.name, label(old)
    replace_value(before, after)
    before.name, after.name = None, output_name
    graph.remove(old, safe=True)
    new.name = name


def _bias_row(inserter: Inserter, node: ir.Node, columns: int) -> ir.Value | None:
    """A Gemm's bias as the (N,) that MatMulNBits takes, beta multiplied in."""
    value = input_of(node, 2) if node.op_type == "Gemm" else None
    array = constant_of(value)
    if value is None or array is None:
        return None
    beta = np.float32(attribute(node, "beta", 1.0))
    if array.shape == (columns,) and beta == 1:
        return value
    return inserter.constant(f"{value.name}_row", np.broadcast_to(array.reshape(-1) * beta, (columns,)))
