"""What a model is made of: operators, parameters, multiply-accumulates, activation memory, a row per layer.

Multiply-accumulates (MACs) are counted for Conv, ConvTranspose, Gemm, MatMul, RNN, GRU and LSTM, their integer and
quantize-dequantize forms, and ONNX Runtime's fused forms; element-wise work is not counted. All figures hold for the
input shapes that the model declares: where those are dynamic, a figure that depends on them is None, with the reason.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import onnx_ir as ir

from graphopt import graph as g
from graphopt.model import signature
from graphopt.shapes.inferred import inferred_shapes
from graphopt.shapes.onnx_inference import infer_shapes

_FIX = "fix the dynamic dimensions with --input"

Dims = tuple[int | str | None, ...]


@dataclass(frozen=True)
class Layer:
    """One node of the main graph."""

    name: str
    op: str
    output_shape: Dims | None
    """Of the first output; a dynamic dimension is its name or None; None when the rank is unknown."""
    macs: int | None
    """None for a counted operator of unknown shape; 0 for operators that are not counted."""
    parameters: int
    """Elements of the constants that the node reads."""
    parameter_bytes: int
    activation_bytes: int | None
    """Of all its outputs; None when a shape is unknown."""


@dataclass(frozen=True)
class Inspection:
    """The result of `inspect`."""

    nodes: int
    """Subgraphs included; Constant nodes are not counted."""
    operators: Mapping[str, int]
    """How many nodes of each type, most frequent first; operators of other domains as `domain::Type`."""
    parameters: int
    parameter_bytes: int
    macs: int | None
    macs_unknown: str
    """Why `macs` is None; empty otherwise."""
    peak_activation_bytes: int | None
    """The most that inputs, intermediate values and outputs take at one time, in the order of the nodes: each value is
    kept from the node that writes it to the last one that reads it; no node writes over its input."""
    peak_unknown: str
    """Why `peak_activation_bytes` is None; empty otherwise."""
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    dynamic_dims: tuple[str, ...]
    """The inputs' dimensions that are not fixed, as `input[axis]` or `input[axis]=name`."""
    opsets: Mapping[str, int]
    ir_version: int
    layers: tuple[Layer, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers, ready for JSON."""
        plain = asdict(self)
        plain["operators"], plain["opsets"] = dict(self.operators), dict(self.opsets)
        for key in ("inputs", "outputs", "dynamic_dims", "layers"):
            plain[key] = list(plain[key])
        for layer in plain["layers"]:
            layer["output_shape"] = None if layer["output_shape"] is None else list(layer["output_shape"])
        return plain


def inspect(model: ir.Model) -> Inspection:
    """Count and measure `model`, which is not changed. Raises ModelError for inputs or outputs that are no tensors."""
    caller = signature(model)
    shapes = _Shapes(model)
    rows = tuple(_layer(node, shapes) for node in model.graph if node.op_type != "Constant")
    macs, macs_unknown = _total_macs(model, rows)
    peak, peak_unknown = _peak(model, shapes)
    count, size = _parameters(model)
    operators = Counter(_type(node) for node in model.graph.all_nodes() if node.op_type != "Constant")
    return Inspection(
        nodes=sum(operators.values()),
        operators=dict(sorted(operators.items(), key=lambda item: (-item[1], item[0]))),
        parameters=count,
        parameter_bytes=size,
        macs=macs,
        macs_unknown=macs_unknown,
        peak_activation_bytes=peak,
        peak_unknown=peak_unknown,
        inputs=tuple(str(spec) for spec in caller.inputs),
        outputs=tuple(str(spec) for spec in caller.outputs),
        dynamic_dims=tuple(
            f"{spec.name}[{axis}]" + (f"={d}" if isinstance(d, str) else "")
            for spec in caller.inputs
            for axis, d in enumerate(spec.shape)
            if not isinstance(d, int)
        ),
        opsets={domain or "ai.onnx": version for domain, version in sorted(model.opset_imports.items())},
        ir_version=int(model.ir_version or 0),
        layers=rows,
    )


class _Shapes:
    """Shapes and element sizes of the main graph's values by name, as far as they can be inferred."""

    def __init__(self, model: ir.Model):
        self._shapes: dict[str, Dims] = dict(inferred_shapes(model))
        dtypes = {
            **_inferred_types(model),
            **{str(v.name): v.dtype for v in _values(model.graph) if v.dtype is not None},
        }
        unsized = (ir.DataType.STRING, ir.DataType.UNDEFINED)
        self._item_bytes = {name: dtype.itemsize for name, dtype in dtypes.items() if dtype not in unsized}
        for value in (*model.graph.inputs, *model.graph.outputs):  # the names people know
            known = self._shapes.get(str(value.name))
            if value.shape is not None and known is not None and len(known) == len(value.shape):
                named = [d if isinstance(d, int) else d.value for d in value.shape]
                self._shapes[str(value.name)] = tuple(
                    k if k is not None else n for k, n in zip(known, named, strict=True)
                )

    def dims(self, value: ir.Value | None) -> Dims | None:
        return None if value is None else self._shapes.get(str(value.name))

    def static(self, value: ir.Value | None) -> tuple[int, ...] | None:
        dims = self.dims(value)
        if dims is None or not all(isinstance(d, int) for d in dims):
            return None
        return tuple(d for d in dims if isinstance(d, int))

    def bytes_of(self, value: ir.Value) -> int | None:
        shape, item = self.static(value), self._item_bytes.get(str(value.name))
        return None if shape is None or item is None else math.ceil(math.prod(shape) * item)


def _inferred_types(model: ir.Model) -> dict[str, ir.DataType]:
    scratch = model.clone()
    infer_shapes(scratch)
    return {str(v.name): v.dtype for v in _values(scratch.graph) if v.dtype is not None}


def _values(graph: ir.Graph):
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from (v for v in node.outputs if v.name)


def _type(node: ir.Node) -> str:
    return node.op_type if g.is_onnx(node) else f"{node.domain}::{node.op_type}"


def _layer(node: ir.Node, shapes: _Shapes) -> Layer:
    counter = _COUNTED.get(node.op_type)
    constants = {id(v): v for v in node.inputs if v is not None and g.tensor_of(v) is not None}.values()
    sizes = [shapes.bytes_of(v) for v in node.outputs if v.name]
    return Layer(
        name=g.label(node),
        op=_type(node),
        output_shape=shapes.dims(node.outputs[0]) if node.outputs else None,
        macs=counter(node, shapes) if counter is not None else 0,
        parameters=sum(math.prod(t.shape.numpy()) for v in constants if (t := g.tensor_of(v)) is not None),
        parameter_bytes=sum(t.nbytes for v in constants if (t := g.tensor_of(v)) is not None),
        activation_bytes=None if any(s is None for s in sizes) else sum(s for s in sizes if s is not None),
    )


def _parameters(model: ir.Model) -> tuple[int, int]:
    tensors = []
    for graph in (model.graph, *model.graph.subgraphs()):
        tensors += [v.const_value for v in graph.initializers.values() if v.const_value is not None]
        tensors += [t for n in graph if n.op_type == "Constant" and (t := g.tensor_of(n.outputs[0])) is not None]
    return sum(math.prod(t.shape.numpy()) for t in tensors), sum(t.nbytes for t in tensors)


def _total_macs(model: ir.Model, rows: tuple[Layer, ...]) -> tuple[int | None, str]:
    inner = [n for graph in model.graph.subgraphs() for n in graph if n.op_type in _COUNTED]
    if inner:
        return None, f"{inner[0].op_type} {g.label(inner[0])!r} is inside a subgraph, which may run any number of times"
    unknown = [row for row in rows if row.macs is None]
    if unknown:
        more = f" and {len(unknown) - 1} more nodes" if len(unknown) > 1 else ""
        return None, f"the shapes of {unknown[0].op} {unknown[0].name!r}{more} are not known; {_FIX}"
    return sum(row.macs or 0 for row in rows), ""


def _peak(model: ir.Model, shapes: _Shapes) -> tuple[int | None, str]:
    """Walk the nodes in order; a value dies after its last reader, an output of the model never."""
    order = list(model.graph)
    last: dict[ir.Value, int] = {}
    for position, node in enumerate(order):
        for value in _reads(node):
            last[value] = position
    kept = set(model.graph.outputs)
    live = 0
    sizes: dict[ir.Value, int] = {}

    def take(value: ir.Value) -> int | None:
        size = shapes.bytes_of(value)
        if size is not None:
            sizes[value] = size
        return size

    for value in model.graph.inputs:
        if g.tensor_of(value) is None:
            size = take(value)
            if size is None:
                return None, f"the shape of input {value.name!r} is not known; {_FIX}"
            live += size
    peak = live
    for position, node in enumerate(order):
        if node.op_type == "Constant":
            continue
        for value in node.outputs:
            if value.name:
                size = take(value)
                if size is None:
                    return None, f"the shape of {value.name!r} is not known; {_FIX}"
                live += size
        peak = max(peak, live)
        dying = {v for v in (*_reads(node), *node.outputs) if v in sizes and v not in kept}
        for value in dying:
            if last.get(value, position) <= position:
                live -= sizes.pop(value)
    return peak, ""


def _reads(node: ir.Node) -> set[ir.Value]:
    """What the node and the graphs inside it read."""
    found = {v for v in node.inputs if v is not None}
    for attribute in node.attributes.values():
        graphs = (
            [attribute.as_graph()]
            if attribute.type == ir.AttributeType.GRAPH
            else list(attribute.as_graphs())
            if attribute.type == ir.AttributeType.GRAPHS
            else []
        )
        for graph in graphs:
            found.update(graph.outputs)
            for inner in graph:
                found |= _reads(inner)
    return found


# -- multiply-accumulates of one node; None when a shape is unknown -------------------------------------------------


def _convolution(weight: int) -> Callable[[ir.Node, _Shapes], int | None]:
    def count(node: ir.Node, shapes: _Shapes) -> int | None:
        """Every output element sums over C/group x kernel."""
        out, w = shapes.static(node.outputs[0]), shapes.static(g.input_of(node, weight))
        return None if out is None or w is None else math.prod(out) * math.prod(w[1:])

    return count


def _transposed_convolution(node: ir.Node, shapes: _Shapes) -> int | None:
    """Every input element is spread over M/group x kernel."""
    data, w = shapes.static(node.inputs[0]), shapes.static(g.input_of(node, 1))
    return None if data is None or w is None else math.prod(data) * math.prod(w[1:])


def _product(left: int) -> Callable[[ir.Node, _Shapes], int | None]:
    def count(node: ir.Node, shapes: _Shapes) -> int | None:
        """Every output element sums over K, the left operand's last dimension (transA: the one before it)."""
        out, a = shapes.static(node.outputs[0]), shapes.dims(g.input_of(node, left))
        if out is None or a is None or len(a) == 0:
            return None
        inner = a[len(a) - (2 if g.attribute(node, "transA", 0) and len(a) > 1 else 1)]
        return math.prod(out) * inner if isinstance(inner, int) else None

    return count


def _recurrent(node: ir.Node, shapes: _Shapes) -> int | None:
    """X: (seq, batch, input) in either order; W: (directions, gates*hidden, input); R: (.., .., hidden)."""
    data, w, r = (shapes.static(g.input_of(node, k)) for k in (0, 1, 2))
    if data is None or w is None or r is None or min(len(data), len(w), len(r)) < 3:
        return None
    return data[0] * data[1] * w[0] * w[1] * (w[2] + r[2])


def _attention(node: ir.Node, shapes: _Shapes) -> int | None:
    """q k^T and its product with v; operands are (batch, heads, places, size) or (batch, places, heads*size)."""
    q, k, v = (shapes.static(g.input_of(node, i)) for i in (0, 1, 2))
    if not g.is_onnx(node) or q is None or k is None or v is None or len(node.inputs) > 4:
        return None
    if len(q) == 4:
        return q[0] * q[1] * q[2] * k[2] * (q[3] + v[3])
    heads, groups = g.attribute(node, "q_num_heads", 0), g.attribute(node, "kv_num_heads", 0)
    return q[0] * q[1] * k[1] * (q[2] + v[2] // groups * heads) if heads and groups else None


_COUNTED: dict[str, Callable[[ir.Node, _Shapes], int | None]] = {
    "Conv": _convolution(1),
    "ConvInteger": _convolution(1),
    "FusedConv": _convolution(1),
    "NhwcFusedConv": _convolution(1),
    "QLinearConv": _convolution(3),
    "ConvTranspose": _transposed_convolution,
    "Gemm": _product(0),
    "FusedGemm": _product(0),
    "QGemm": _product(0),
    "MatMul": _product(0),
    "FusedMatMul": _product(0),
    "MatMulInteger": _product(0),
    "MatMulIntegerToFloat": _product(0),
    "DynamicQuantizeMatMul": _product(0),
    "QLinearMatMul": _product(0),
    "MatMulNBits": _product(0),
    "Attention": _attention,
    "RNN": _recurrent,
    "GRU": _recurrent,
    "LSTM": _recurrent,
}
