"""Which layers are quantized, which values carry 8 bits, and which of these share one scale.

ONNX Runtime and OpenVINO recognise an integer operator as DequantizeLinear -> operator -> QuantizeLinear. So a layer
with weights (Conv, Gemm, MatMul) needs its input quantized and, for Conv, its output too; the Relu or Clip behind it
belongs to it, because saturation of the 8-bit output computes it for free. From there the integer region grows over
operators with 8-bit kernels as long as it leads to another layer: pooling, residual Add, Concat, reshapes. What only
leads to the outputs (a last pooling, the softmax) stays float: nothing would be gained and accuracy would be lost.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from graphopt.graph import attribute, constant_of, input_of, label, sole_consumer
from graphopt.passes.base import Skip

LAYERS = frozenset({"Conv", "Gemm", "MatMul"})
UNSUPPORTED_LAYERS = {
    "ConvTranspose": "ONNX Runtime has no 8-bit kernel for it on CPU",
    "GRU": "recurrent layers have no 8-bit Q/DQ form",
    "LSTM": "recurrent layers have no 8-bit Q/DQ form",
    "RNN": "recurrent layers have no 8-bit Q/DQ form",
    "Einsum": "it has no 8-bit kernel",
    "Attention": "it has no 8-bit kernel",
}
KEEPS_SCALE = frozenset({
    "MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Gather", "Expand",
    "DepthToSpace", "SpaceToDepth", "Split", "Identity",
})  # fmt: skip
"""Operators that only move 8-bit values: input and output share scale and zero point, and no arithmetic is left."""
RESCALES = frozenset({"Add", "Mul", "AveragePool", "GlobalAveragePool", "LeakyRelu", "Sigmoid", "Concat"})
"""Operators with 8-bit kernels of their own."""
Bounds = tuple[float, float]
UNBOUNDED: Bounds = (-np.inf, np.inf)


@dataclass(frozen=True)
class Layer:
    """A node with constant weights that will compute in integers."""

    node: ir.Node
    weight_index: int
    channel_axis: int
    """The axis of the weights that counts output channels."""
    output: ir.Value
    """Behind the fused activation."""
    bias: tuple[ir.Node, int] | None = None
    """The node and input that hold the bias, or will: its own third input, or that of an Add behind a MatMul."""

    @property
    def input(self) -> ir.Value:
        """The activations it multiplies."""
        value = self.node.inputs[0]
        assert value is not None
        return value


@dataclass
class Family:
    """Values that share one scale and zero point."""

    members: list[ir.Value] = field(default_factory=list)
    roots: list[ir.Value] = field(default_factory=list)
    """Members that arithmetic produces: their statistics decide the range."""
    bounds: Bounds = UNBOUNDED
    """What the fused activation clips to: quantization must not reach beyond, or it cannot replace the clip."""
    through: Callable[[np.ndarray], np.ndarray] | None = None
    """The elementwise function that alone consumes the value, where its output is what has to come out right."""


@dataclass(frozen=True)
class Placement:
    """The result: layers, families of quantized values, and who reads the quantized form."""

    layers: tuple[Layer, ...]
    families: tuple[Family, ...]
    integer_nodes: frozenset[ir.Node]
    """Layers, the activations fused with them, and operators inside the integer region."""
    skipped: tuple[Skip, ...]


def place(graph: ir.Graph, exclude: Collection[str] = (), exclude_types: Collection[str] = ()) -> Placement:
    """Decide for `graph`. `exclude`: names of nodes, or of the first output of nameless ones."""
    layers: dict[ir.Node, Layer] = {}
    skipped: list[Skip] = []
    for node in graph:
        if node.op_type not in LAYERS and node.op_type not in UNSUPPORTED_LAYERS:
            continue
        found = _layer(node, exclude, exclude_types)
        if isinstance(found, Layer):
            layers[node] = found
        else:
            skipped.append(Skip(label(node), found))
    possible = _possible(graph, layers, exclude, exclude_types)
    quantized, inside = _useful(graph, layers, possible)
    integer = set(layers) | set(inside) | {layer.bias[0] for layer in layers.values() if layer.bias is not None}
    for node in list(integer):
        fused = fused_activation(node)
        if fused is not None:
            integer.add(fused)
    families = _families(graph, quantized, inside)
    return Placement(tuple(layers.values()), tuple(families), frozenset(integer), tuple(skipped))


def _layer(node: ir.Node, exclude: Collection[str], exclude_types: Collection[str]) -> Layer | str:
    if label(node) in exclude:
        return "excluded by name"
    if node.op_type in exclude_types:
        return f"excluded by type {node.op_type}"
    if node.op_type in UNSUPPORTED_LAYERS:
        return UNSUPPORTED_LAYERS[node.op_type]
    if node.domain not in ("", "ai.onnx"):
        return f"operator of domain {node.domain}"
    sides = [constant_of(value) for value in node.inputs[:2]]
    weights = sides[1]
    if weights is None:
        if sides[0] is not None and node.op_type == "MatMul":
            return "its constant operand is on the left"
        return "its weights are quantized already" if is_dequantized(node) else "its weights are not constant"
    if sides[0] is not None:
        return "both operands are constant: fold it first"
    if weights.dtype != np.float32:
        return f"its weights are {weights.dtype}, not float32"
    if not np.isfinite(weights).all():
        return "its weights hold NaN or infinity"
    if node.op_type == "Conv":
        if len(node.inputs) > 2 and node.inputs[2] is not None and constant_of(node.inputs[2]) is None:
            return "its bias is not constant"
        return Layer(node, 1, 0, output_of(node), (node, 2))
    if weights.ndim != 2:
        return f"its weights have rank {weights.ndim}, not 2"
    if node.op_type == "Gemm":
        if attribute(node, "transA", 0):
            return "its input is transposed"
        columns = weights.shape[0] if attribute(node, "transB", 0) else weights.shape[1]
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            bias = constant_of(node.inputs[2])
            if bias is None:
                return "its bias is not constant"
            if bias.size not in (1, columns) or (bias.size > 1 and bias.shape[-1] != columns):
                return f"its bias has shape {list(bias.shape)}, not one value a column"
        return Layer(node, 1, 0 if attribute(node, "transB", 0) else 1, output_of(node), (node, 2))
    added = _added_bias(node, weights.shape[1])
    return Layer(node, 1, 1, output_of(node if added is None else added[0]), added)


def is_dequantized(node: ir.Node) -> bool:
    """Whether the weights are stored in few bits."""
    value = input_of(node, 1)
    source = None if value is None else value.producer()
    if source is not None and source.op_type == "Reshape" and source.inputs[0] is not None:
        source = source.inputs[0].producer()
    return source is not None and source.op_type == "DequantizeLinear" and constant_of(source.inputs[0]) is not None


def _added_bias(node: ir.Node, columns: int) -> tuple[ir.Node, int] | None:
    """The Add of one constant a column that alone reads a MatMul: engines make both one Gemm, so its bias is 32-bit."""
    add = sole_consumer(node.outputs[0])
    if add is None or add.op_type != "Add":
        return None
    index = 1 if add.inputs[0] is node.outputs[0] else 0
    bias = constant_of(add.inputs[index])
    if bias is None or bias.dtype != np.float32 or bias.size != columns or bias.ndim == 0 or bias.shape[-1] != columns:
        return None
    return add, index


def fused_activation(node: ir.Node) -> ir.Node | None:
    """The Relu, or Clip with constant bounds around zero, that alone reads the output of a Conv, Gemm, MatMul, Add."""
    if node.op_type not in LAYERS and node.op_type != "Add":
        return None
    reader = sole_consumer(node.outputs[0])
    if reader is None or reader.op_type not in ("Relu", "Clip") or activation_bounds(reader) is None:
        return None
    return reader


def activation_bounds(node: ir.Node) -> Bounds | None:
    """What a Relu or Clip clips to; None where that is not constant, or leaves no room on either side of zero."""
    if node.op_type == "Relu":
        return (0.0, np.inf)
    limits = []
    for index, name, default in ((1, "min", -np.inf), (2, "max", np.inf)):
        value = node.inputs[index] if len(node.inputs) > index else None
        if value is None:
            limits.append(float(attribute(node, name, default)))
            continue
        constant = constant_of(value)
        if constant is None or constant.size != 1:
            return None
        limits.append(float(constant.reshape(())))
    low, high = limits
    return (low, high) if low <= 0.0 < high else None


def output_of(node: ir.Node) -> ir.Value:
    """The node's output behind its fused activation."""
    fused = fused_activation(node)
    return (fused or node).outputs[0]


def data_inputs(node: ir.Node) -> list[ir.Value]:
    """The inputs that carry activations: all of an elementwise operator or Concat, else the first."""
    if node.op_type in ("Add", "Mul", "Concat"):
        return [value for value in node.inputs if value is not None]
    return [value for value in node.inputs[:1] if value is not None]


def _possible(
    graph: ir.Graph, layers: dict[ir.Node, Layer], exclude: Collection[str], exclude_types: Collection[str]
) -> dict[ir.Node, ir.Value | None]:
    """Operators whose inputs can all be 8-bit already, in graph order."""
    available = {layer.node.inputs[0] for layer in layers.values()} | {layer.output for layer in layers.values()}
    found: dict[ir.Node, ir.Value | None] = {}
    for node in graph:
        if node.op_type not in KEEPS_SCALE and node.op_type not in RESCALES:
            continue
        if node.domain not in ("", "ai.onnx") or label(node) in exclude or node.op_type in exclude_types:
            continue
        inputs = data_inputs(node)
        if not inputs or any(value not in available for value in inputs):
            continue
        if node.op_type == "MaxPool" and len(node.outputs) > 1:
            continue  # its indices are no 8-bit value
        if any(value.dtype not in (None, ir.DataType.FLOAT) for value in inputs):
            continue
        found[node] = None
        available.update([output_of(node)] if len(node.outputs) == 1 else node.outputs)
    return found


def _useful(
    graph: ir.Graph, layers: dict[ir.Node, Layer], possible: dict[ir.Node, ir.Value | None]
) -> tuple[list[ir.Value], list[ir.Node]]:
    """Values to quantize, in graph order, and the operators of `possible` that lead to a layer."""
    wanted: set[ir.Value] = {layer.node.inputs[0] for layer in layers.values()}  # pyright: ignore[reportAssignmentType]
    inside: list[ir.Node] = []
    for node in reversed(list(possible)):
        outputs = [output_of(node)] if len(node.outputs) == 1 else list(node.outputs)
        if any(value in wanted for value in outputs):
            wanted.update(data_inputs(node))
            wanted.update(outputs)
            inside.append(node)
    wanted.update(layer.output for layer in layers.values() if layer.node.op_type == "Conv")
    wanted.update(value for layer in layers.values() if (value := _closing(layer, wanted)) is not None)
    order = [*graph.inputs, *(value for node in graph for value in node.outputs)]
    return [value for value in order if value in wanted], inside[::-1]


def _closing(layer: Layer, wanted: Collection[ir.Value]) -> ir.Value | None:
    """What more has to be quantized for ONNX Runtime to see that a product is done in integers.

    It does so where the output stays float, but not where a Relu or Clip is between. A product in 4 bits behind that is
    not to read a DequantizeLinear: it would no longer become MatMulNBits. Then the activation stays float.
    """
    if layer.node.op_type == "Conv" or layer.output in wanted or layer.output.is_graph_output():
        return None
    last = layer.bias[0] if layer.node.op_type == "MatMul" and layer.bias is not None else layer.node
    if fused_activation(last) is None:
        return None
    readers = [usage.node for usage in layer.output.uses()]
    beside = any(node.op_type in LAYERS and is_dequantized(node) and input_of(node, 2) is None for node in readers)
    return last.outputs[0] if beside else layer.output


def _families(graph: ir.Graph, quantized: list[ir.Value], inside: list[ir.Node]) -> list[Family]:
    parent = {value: value for value in quantized}

    def root(value: ir.Value) -> ir.Value:
        while parent[value] is not value:
            value = parent[value]
        return value

    moved: set[ir.Value] = set()
    for node in inside:
        if node.op_type in KEEPS_SCALE:
            source = node.inputs[0]
            for output in node.outputs:
                if source is not None and output in parent:
                    parent[root(output)] = root(source)
                    moved.add(output)
    bounds = {value: _bounds(value) for value in quantized}
    for node in inside:
        if node.op_type != "Concat":
            continue
        sources = data_inputs(node)
        # A shared scale spares the inputs a second rounding, and costs nothing where only the Concat reads them.
        # Different clips cannot share: quantization would no longer compute all of them.
        if len({_origin_bounds(value, bounds, parent, root) for value in sources}) > 1:
            continue
        joined = [value for value in sources if sole_consumer(value) is node]
        for value in joined:
            parent[root(value)] = root(node.outputs[0])
        if len(joined) == len(sources):
            moved.add(node.outputs[0])
    families: dict[ir.Value, Family] = {}
    for value in quantized:
        family = families.setdefault(root(value), Family())
        family.members.append(value)
        if value not in moved:
            family.roots.append(value)
            low, high = bounds[value]
            family.bounds = (max(family.bounds[0], low), min(family.bounds[1], high))
    for family in families.values():
        if len(family.members) == 1:
            family.through = _sole_function(family.members[0])
    return list(families.values())


def _bounds(value: ir.Value) -> Bounds:
    node = value.producer()
    if node is None or node.op_type not in ("Relu", "Clip"):
        return UNBOUNDED
    before = node.inputs[0].producer() if node.inputs[0] is not None else None
    fused = before is not None and fused_activation(before) is node
    return (activation_bounds(node) or UNBOUNDED) if fused else UNBOUNDED


def _origin_bounds(value: ir.Value, bounds: dict, parent: dict, root: Callable) -> Bounds:
    """The clip of the values of the same family that are clipped (all of one family are clipped alike)."""
    mine = root(value)
    found = {bounds[other] for other in parent if root(other) is mine and bounds[other] != UNBOUNDED}
    return found.pop() if len(found) == 1 else UNBOUNDED


def _sole_function(value: ir.Value) -> Callable[[np.ndarray], np.ndarray] | None:
    node = sole_consumer(value)
    if node is None:
        return None
    if node.op_type == "LeakyRelu":
        alpha = float(attribute(node, "alpha", 0.01))
        return lambda x: np.where(x < 0, alpha * x, x)
    if node.op_type == "Sigmoid":
        return lambda x: 1 / (1 + np.exp(-np.clip(x, -80, 80)))
    if node.op_type == "HardSwish":
        return lambda x: x * np.clip(x / 6 + 0.5, 0, 1)
    return None
