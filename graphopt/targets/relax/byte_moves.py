"""Quantized graphs in the form that integer kernels want: elements move as bytes, and bytes have no sign.

Three exact rewrites of an ONNX graph.

*Dequantize after moving.* DequantizeLinear works element by element and is monotonic: it may as well run behind an
operator that only moves elements or takes the largest. Where all inputs of such an operator were dequantized with one
scale, it moves their bytes instead.

*Quantize before moving.* Concat of values with different scales, all to be quantized with another one, rescales each
of them first and moves bytes as well.

*One type of activations.* The dot products of x86 multiply unsigned bytes by signed ones, those of ARM signed bytes by
signed ones. An int8 activation x with zero point z is the same as the uint8 activation x + 128 with zero point z + 128,
so where such a value goes from QuantizeLinear to DequantizeLinear, directly or through moves, only the zero points
change.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt.graph import attribute, constant_of, input_of, is_onnx

MOVES = frozenset(
    ["MaxPool", "Concat", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Split", "Identity",
     "DepthToSpace", "SpaceToDepth", "Resize", "Expand", "Tile", "Gather"]
)  # fmt: skip
"""Operators whose outputs are among the elements of their inputs (Resize: by nearest neighbour)."""

Scheme = tuple[float, int, str]
"""Scale, zero point and element type of a value with one of each."""


def rewrite(model: ir.Model, byte_type: str) -> None:
    """Apply the rewrites to the main graph, in place; activations become `byte_type`, `uint8` or `int8`."""
    for node in list(model.graph):
        _dequantize_after(model.graph, node)
    for node in reversed(list(model.graph)):
        _quantize_before(model.graph, node)
    _make(model.graph, byte_type)


def scheme_of(node: ir.Node) -> Scheme | None:
    """What a QuantizeLinear or DequantizeLinear with one constant scale does; None for any other node."""
    if not is_onnx(node, "QuantizeLinear", "DequantizeLinear") or attribute(node, "block_size", 0):
        return None
    scale, zero = constant_of(input_of(node, 1)), input_of(node, 2)
    point = np.zeros(1, np.uint8) if zero is None else constant_of(zero)
    if scale is None or scale.size != 1 or scale.dtype != np.float32 or point is None or point.size != 1:
        return None
    return float(scale.reshape(())), int(point.reshape(())), str(point.dtype)


def _data_inputs(node: ir.Node) -> list[ir.Value]:
    inputs = node.inputs if node.op_type == "Concat" else node.inputs[:1]
    return [value for value in inputs if value is not None]


def _moves(node: ir.Node) -> bool:
    if not is_onnx(node) or node.op_type not in MOVES:
        return False
    if node.op_type == "Resize":
        return attribute(node, "mode", "nearest") == "nearest"
    return len(node.outputs) == 1 or node.op_type == "Split"


def _dequantize_after(graph: ir.Graph, node: ir.Node) -> None:
    """Let a moving node whose inputs are dequantized with one scheme move their bytes."""
    sources = _data_inputs(node) if _moves(node) else []
    schemes = {_dequantizing(value) for value in sources}
    if len(schemes) != 1 or None in schemes or any(output.is_graph_output() for output in node.outputs):
        return
    (scheme,) = schemes
    template = sources[0].producer()
    assert scheme is not None and template is not None
    for index, value in enumerate(node.inputs):
        if value in sources and (node.op_type == "Concat" or index == 0):
            producer = value.producer()
            assert producer is not None
            node.replace_input_with(index, producer.inputs[0])
    last = node
    for output in node.outputs:
        made = ir.node("DequantizeLinear", [output, *template.inputs[1:]], name=f"{output.name}/dequantized")
        made.outputs[0].name, made.outputs[0].shape = f"{output.name}/dequantized", output.shape
        made.outputs[0].type = output.type
        output.type = ir.TensorType(ir.DataType.from_numpy(np.dtype(scheme[2])))
        output.replace_all_uses_with(made.outputs[0])
        made.replace_input_with(0, output)
        graph.insert_after(last, made)
        last = made


def _quantize_before(graph: ir.Graph, node: ir.Node) -> None:
    """Move the QuantizeLinear nodes behind a moving node, where all its readers are such of one scheme, before it."""
    if not _moves(node) or len(node.outputs) != 1 or node.outputs[0].is_graph_output():
        return
    output = node.outputs[0]
    readers = [usage.node for usage in output.uses()]
    schemes = {scheme_of(reader) if reader.op_type == "QuantizeLinear" else None for reader in readers}
    sources = _data_inputs(node)
    if len(schemes) != 1 or None in schemes or not all(_dequantizing(value) for value in sources):
        return
    template = readers[0]
    (scheme,) = schemes
    assert scheme is not None
    output.type = ir.TensorType(ir.DataType.from_numpy(np.dtype(scheme[2])))
    quantized: dict[ir.Value, ir.Value] = {}
    for i, value in enumerate(dict.fromkeys(sources)):
        made = ir.node("QuantizeLinear", [value, *template.inputs[1:]], name=f"{template.name or output.name}/{i}")
        made.outputs[0].name = f"{template.outputs[0].name}/{i}"
        made.outputs[0].type, made.outputs[0].shape = output.type, value.shape
        graph.insert_before(node, made)
        quantized[value] = made.outputs[0]
    for index, value in enumerate(node.inputs):
        if value in quantized and (node.op_type == "Concat" or index == 0):
            node.replace_input_with(index, quantized[value])
    for reader in readers:
        if reader.outputs[0].is_graph_output():
            moved = ir.node("Identity", [output], name=f"{reader.name}/moved")
            graph.insert_after(reader, moved)
            moved.outputs[0].name, moved.outputs[0].type = reader.outputs[0].name, reader.outputs[0].type
            moved.outputs[0].shape = reader.outputs[0].shape
            reader.outputs[0].name = None
            reader.outputs[0].replace_all_uses_with(moved.outputs[0], replace_graph_outputs=True)
        else:
            reader.outputs[0].replace_all_uses_with(output)
        graph.remove(reader, safe=True)


def _dequantizing(value: ir.Value) -> Scheme | None:
    """The scheme of the DequantizeLinear that makes a value; None where something else does."""
    producer = value.producer()
    found = scheme_of(producer) if producer is not None and is_onnx(producer, "DequantizeLinear") else None
    return found if found is not None and found[2] in ("uint8", "int8") else None


def _make(graph: ir.Graph, byte_type: str) -> None:
    """Bytes of the other type that begin at QuantizeLinear and end at DequantizeLinear become `byte_type`."""
    other = "int8" if byte_type == "uint8" else "uint8"
    families: dict[ir.Value, _Family] = {}
    for node in graph:
        if node.op_type == "QuantizeLinear" and (scheme_of(node) or (0, 0, ""))[2] == other:
            families[node.outputs[0]] = _Family([node.outputs[0]])
        elif _moves(node):
            sources = [families.get(value) for value in _data_inputs(node)]
            known = [family for family in sources if family is not None]
            if not known:
                continue
            joined = _Family(list(node.outputs), begins_here=len(known) == len(sources))
            for family in {id(family): family for family in known}.values():
                joined.members += family.members
                joined.begins_here &= family.begins_here
            families.update(dict.fromkeys(joined.members, joined))
    for family in {id(family): family for family in families.values()}.values():
        if family.begins_here and all(_ends_dequantized(value) for value in family.members):
            _shift(graph, family.members, byte_type)


@dataclass
class _Family:
    """Values of one type that moves connect."""

    members: list[ir.Value]
    begins_here: bool = True
    """False where one of them comes from elsewhere: a graph input, say."""


def _ends_dequantized(value: ir.Value) -> bool:
    if value.is_graph_output():
        return False
    return all(
        _moves(use.node) or (use.node.op_type == "DequantizeLinear" and scheme_of(use.node) is not None)
        for use in value.uses()
    )


def _shift(graph: ir.Graph, values: Iterable[ir.Value], byte_type: str) -> None:
    """Make these values `byte_type`: 128 more, or less, with the zero points of those who make and read them."""
    more = 128 if byte_type == "uint8" else -128
    for value in values:
        producer = value.producer()
        ends = [use.node for use in value.uses() if use.node.op_type == "DequantizeLinear"]
        for node in [*ends, *([producer] if producer is not None and producer.op_type == "QuantizeLinear" else [])]:
            scheme = scheme_of(node)
            assert scheme is not None
            point = ir.node("Constant", [], {"value": ir.tensor(np.asarray(scheme[1] + more, byte_type))})
            point.outputs[0].name = f"{node.name or node.outputs[0].name}/{byte_type}"
            graph.insert_before(node, point)
            if len(node.inputs) > 2:
                node.replace_input_with(2, point.outputs[0])
            else:
                node.resize_inputs(3)
                node.replace_input_with(2, point.outputs[0])
            if node is producer:
                node.attributes.pop("output_dtype", None)
        value.type = ir.TensorType(ir.DataType.from_numpy(np.dtype(byte_type)))
