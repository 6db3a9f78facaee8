"""ONNX -> Relax, one node at a time.

The ways, in this order:

1. every operand is known now: the node is computed (ONNX's reference implementation), so shape arithmetic and the
   dequantization of weights vanish;
2. an emitter (`EMITTERS`) lowers it, in blocked form where that pays;
3. it steers: the branch of an If whose condition is known is imported in its place, and the turns of a Loop or Scan
   and the steps of an RNN, GRU or LSTM one after another, where their number is known and small;
4. TVM's own converter for the operator, on plain tensors, unless that is known to compute it wrongly (`unsound`);
5. the operators that ONNX defines it by.

Walking the nodes here rather than in `relax.frontend.onnx.from_onnx` keeps activations blocked from one operator to
the next without a layout pass, and lets an error name the node.
"""

from __future__ import annotations

import contextlib
import copy
import io
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import onnx_ir as ir

from graphopt import guard
from graphopt.errors import TargetError, UnsupportedOperatorError
from graphopt.graph import constant_of
from graphopt.targets.relax import (
    attention,
    block_weights,
    byte_moves,
    constants,
    control_flow,
    conv_transpose,
    convolution,
    defined_elementwise,
    deform_conv,
    elementwise_operators,
    expansion,
    explicit_pads,
    fourier,
    index_bounds,
    integer_layers,
    integer_operators,
    nodes,
    normalization,
    placed_elements,
    pooling,
    products,
    qoperators,
    reductions,
    resize,
    rows,
    running_products,
    shape_operators,
    unsound,
    views,
    written_out,
)
from graphopt.targets.relax.emitters import EMITTERS, Node
from graphopt.targets.relax.form import Form
from graphopt.targets.relax.values import Builder, Value, constant, element_type

_ = (
    attention,
    convolution,
    conv_transpose,
    defined_elementwise,
    deform_conv,
    elementwise_operators,
    fourier,
    integer_operators,
    normalization,
    placed_elements,
    pooling,
    products,
    reductions,
    resize,
    running_products,
    shape_operators,
    views,
)  # importing them fills EMITTERS
DTYPES = frozenset(
    ["float32", "float64", "float16", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "bool"]
)


_FUSED = frozenset(
    ["Relu", "Clip", "LeakyRelu", "HardSigmoid", "HardSwish", "Sigmoid", "Tanh", "Exp", "Swish", "Identity", "Dropout",
     "Add", "Sub", "Mul", "Div", "Max", "Min", "Sum", "BatchNormalization"]
)  # fmt: skip
"""Operators that run in the registers of the kernel before them."""
_MOVES = frozenset(
    ["Transpose", "Reshape", "Split", "Slice", "Concat", "Expand", "Tile", "DepthToSpace", "SpaceToDepth"]
)
"""Operators that move elements and look at none."""
_OF_CONSTANTS = frozenset({"MelWeightMatrix"})
"""Operators that are computed when a model is compiled, from operands that are known then, or not at all."""
_DATA_DEPENDENT = frozenset({"NonMaxSuppression", "NonZero", "Unique", "Compress"})
"""Operators whose output shape depends on data; TVM gives some of them a static one."""


def multiplies_bytes(model: ir.Model) -> bool:
    """Whether a model is quantized, so that some of its kernels may multiply bytes."""
    return any(_quantizes(node.op_type) or _reads_bytes(node) for node in model.graph)


def _reads_bytes(node: ir.Node) -> bool:
    """Whether it makes activations of bytes; of constants, it makes weights that may be multiplied as float32."""
    if node.op_type != "DequantizeLinear" or node.inputs[0] is None:
        return False
    return constant_of(node.inputs[0]) is None


def _quantizes(op_type: str) -> bool:
    return (
        "Quantize" in op_type or op_type in ("MatMulInteger", "ConvInteger", "QGemm") or op_type.startswith("QLinear")
    )


@dataclass(frozen=True)
class Imported:
    """A model as Relax."""

    module: Any
    """Its function is `main`."""
    made_for: tuple[tuple[Any, str], ...]
    """The constants in it, and the label of the ONNX node each was made for."""


def import_model(model: ir.Model, form: Form) -> Imported:
    """A model with static input shapes as Relax.

    `form`: how values are stored; inputs and outputs of the graph keep their ONNX types and layouts in any.

    Inputs that are also initializers are constants. Raises UnsupportedOperatorError naming every operator that has no
    translation (and one node of each), and TargetError for anything else TVM refuses.
    """
    proto = prepared(model, form)
    _check_operators(proto)
    return Importer(proto, form).run()


def prepared(model: ir.Model, form: Form) -> onnx.ModelProto:
    """The nodes that are imported: functions inlined, quantized operators in the one form that is understood."""
    proto = ir.to_proto(model)
    if proto.functions:
        proto = onnx.inliner.inline_local_functions(proto)
    if any(_quantizes(node.op_type) or node.op_type == "MatMulNBits" for node in proto.graph.node):
        quantized = ir.from_proto(proto)
        qoperators.rewrite(quantized)
        byte_moves.rewrite(quantized, form.byte_type)
        proto = ir.to_proto(quantized)
    if any(node.op_type in written_out.OPERATORS for node in proto.graph.node):
        plain = ir.from_proto(proto)
        if attention.applies(form):
            attention.in_rows(plain, form)
        written_out.rewrite(plain)
        proto = ir.to_proto(plain)
    return proto


def _check_operators(proto: onnx.ModelProto) -> None:
    missing: dict[str, str] = {}
    for node in proto.graph.node:
        if not has_importer(node):
            missing.setdefault(nodes.operator(node), nodes.label(node))
    if missing:
        listed = ", ".join(f"{op} (node {name!r})" for op, name in sorted(missing.items()))
        raise UnsupportedOperatorError(f"TVM cannot import {listed}", hint=nodes.STAYS)


def has_importer(node: onnx.NodeProto) -> bool:
    """Whether there is any translation of an operator; it may still refuse some attributes and operands."""
    from tvm.relax.frontend.onnx import onnx_frontend

    if node.domain not in ("", "ai.onnx"):
        return False
    if node.op_type in EMITTERS or node.op_type in control_flow.STEERS or node.op_type in ("Constant", *_OF_CONSTANTS):
        return True
    return node.op_type in onnx_frontend._get_convert_map() or expansion.is_defined(node.op_type)


class Importer:
    """Walks the nodes of a model, once."""

    def __init__(self, proto: onnx.ModelProto, form: Form):
        from tvm import relax

        self.proto = proto
        self.builder = Builder(relax.BlockBuilder(), form)
        self.opset = next((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), 1)
        self.values: dict[str, Value] = {}
        self.consumers = _consumers(proto.graph)

    def run(self) -> Imported:
        from tvm import relax

        graph = self.proto.graph
        params = self.parameters()
        bb = self.builder.bb
        with bb.function("main", params):
            with bb.dataflow():
                for node in graph.node:
                    self.node(node)
                outputs = [self._output(o.name) for o in graph.output]
                result = bb.emit_output(outputs[0] if len(outputs) == 1 else relax.Tuple(outputs))
            bb.emit_func_output(result)
        return Imported(bb.get(), tuple(self.builder.made_for))

    def parameters(self) -> list[Any]:
        """The variables of the graph's inputs; these and the initializers become known values."""
        from tvm import relax

        graph = self.proto.graph
        for tensor in graph.initializer:
            guard.at(f"initializer {tensor.name!r}")
            array = onnx.numpy_helper.to_array(tensor)
            self.values[tensor.name] = Value(tuple(array.shape), str(array.dtype), const=array)
        params = []
        for position, info in enumerate(i for i in graph.input if i.name not in self.values):
            shape, dtype = _static_type(info)
            static: Any = shape
            param = relax.Var(f"input_{position}", relax.TensorType(static, dtype))
            params.append(param)
            empty = np.zeros(shape, dtype) if 0 in shape else None
            self.values[info.name] = Value(shape, dtype, plain=param, const=empty)
        return params

    def _output(self, name: str):
        """The plain form under a binding of its own: an output may be an input or a constant."""
        value = self.values[name]
        if value.dtype not in DTYPES:
            raise TargetError(f"output {name!r} is {value.dtype}, which cannot be compiled", hint=nodes.STAYS)
        return self.builder.plain(value)

    def node(self, node: onnx.NodeProto) -> None:
        """Import one node. Raises TargetError."""
        inputs = nodes.without_empty_axes(node, [self.values[name] if name else None for name in node.input])
        self.builder.layer = nodes.label(node)
        if node.op_type == "ConvTranspose":
            node = _padded(node, inputs)
        guard.at(f"node {nodes.label(node)!r} ({node.op_type})")
        results = self._folded(node, inputs)
        if results is None:
            reason = unsound.reason(node, inputs, self.opset)
            if reason is not None:
                raise UnsupportedOperatorError(
                    f"TVM cannot compile {node.op_type}: {reason}", node=nodes.label(node), hint=nodes.STAYS
                )
            results = self._emitted(node, inputs)
        if results is None and node.op_type in control_flow.STEERS:
            results = control_flow.steered(node, inputs, self._subgraph, self.opset)
        if results is None and node.op_type in expansion.PREFERRED:
            results = self._expanded(node, inputs)
        if results is None:
            results = self._converted(node, inputs)
        if len(results) < len(node.output) and any(node.output[len(results) :]):
            raise nodes.refused(node, f"it gives {len(results)} of its {len(node.output)} outputs")
        for name, value in zip(node.output, results, strict=False):
            if name:
                self.values[name] = value
                value.fuses = value.fuses and _fuses(name, self.consumers)
                value.readers = len(self.consumers.get(name, ()))

    def _subgraph(self, graph: onnx.GraphProto, bound: Mapping[str, Value], opset: int | None = None) -> list[Value]:
        """The outputs of a graph that is imported in place; it sees the values around it."""
        inner = copy.copy(self)
        inner.values = {**self.values, **{t.name: constant(onnx.numpy_helper.to_array(t)) for t in graph.initializer}}
        inner.values.update(bound)
        inner.consumers = _consumers(graph)
        inner.opset = self.opset if opset is None else opset
        for node in graph.node:
            inner.node(node)
        return [inner.values[info.name] for info in graph.output]

    def _expanded(self, node: onnx.NodeProto, inputs: list[Value | None]) -> list[Value] | None:
        """What ONNX defines an operator by, imported in its place; None where it has no definition."""
        types = [None if v is None else (v.shape, v.dtype) for v in inputs]
        graph = expansion.definition(node, types, self.opset)
        if graph is None:
            return None
        bound = {name: value for name, value in zip(node.input, inputs, strict=True) if value is not None}
        try:
            made = iter(self._subgraph(graph, bound))
        except TargetError as error:
            raise UnsupportedOperatorError(
                f"TVM cannot import {node.op_type}: {error.what}", node=nodes.label(node), hint=nodes.STAYS
            ) from error
        return [next(made) if name else Value(None, "float32") for name in node.output]

    def _folded(self, node: onnx.NodeProto, inputs: list[Value | None]) -> list[Value] | None:
        if node.op_type in control_flow.STEERS:
            return None
        if node.op_type in ("Shape", "Size") and inputs[0] is not None and inputs[0].shape is not None:
            whole = np.asarray(inputs[0].shape, np.int64)
            if node.op_type == "Size":
                return [constant(np.asarray(whole.prod(), np.int64))]
            bounds = {a.name: a.i for a in node.attribute}
            return [constant(whole[bounds.get("start", 0) : bounds.get("end", len(whole))])]
        if any(v is not None and v.const is None for v in inputs):
            return None
        found = constants.fold(node, [None if v is None else v.const for v in inputs], self.opset)
        if found is None:
            return None
        if node.op_type == "DequantizeLinear" and found[0].dtype == np.float32:
            return [_integers(node, inputs, found[0])]
        arrays = iter(found)
        return [constant(next(arrays)) if name else Value(None, "float32") for name in node.output]

    def _emitted(self, node: onnx.NodeProto, inputs: list[Value | None]) -> list[Value] | None:
        emitter = EMITTERS.get(node.op_type)
        if emitter is None:
            return None
        from tvm.error import InternalError

        view = Node(
            nodes.label(node), node.op_type, nodes.attributes(node), self.opset, len([o for o in node.output if o])
        )
        try:
            return rows.emitted(emitter, self.builder, view, inputs) or emitter(self.builder, view, inputs)
        except (InternalError, ValueError, TypeError) as error:
            raise nodes.refused(node, error) from error

    def _converted(self, node: onnx.NodeProto, inputs: list[Value | None]) -> list[Value]:
        """TVM's own converter. It prints, warns and raises as it likes: all of that becomes one TargetError."""
        from tvm import relax
        from tvm.error import InternalError
        from tvm.relax.frontend.onnx import onnx_frontend

        if node.op_type in _DATA_DEPENDENT:
            raise nodes.dynamic(node)
        operands = onnx_frontend.onnx_input()
        operands.extend(self._operands(node, inputs))
        if node.op_type in index_bounds.INDEXED:
            operands[1] = self._bounded(node, inputs, operands[1])
        repeated: Any = node.attribute
        attributes: dict[str, Any] = onnx_frontend.ONNXGraphImporter({}, {})._parse_attr(repeated)
        attributes["tvm_custom"] = {"name": nodes.label(node), "num_outputs": len(node.output)}
        converter_class = onnx_frontend._get_convert_map().get(node.op_type)
        if converter_class is None:
            defined = self._expanded(node, inputs)
            if defined is not None:
                return defined
            raise UnsupportedOperatorError(
                f"TVM cannot import {node.op_type} with these attributes and operands",
                node=nodes.label(node),
                hint=nodes.STAYS,
            )
        known: Mapping[str, Any] = {name: value.plain for name, value in self.values.items() if value.plain is not None}
        try:
            with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
                warnings.simplefilter("ignore")
                convert = converter_class.get_converter(self.opset)
                made = index_bounds.safe_take(convert(self.builder.bb, operands, attributes, [known, {}]))
                if isinstance(made, relax.Expr):
                    made = self.builder.bb.normalize(made)
        except (InternalError, NotImplementedError, ValueError, TypeError, KeyError, IndexError, AttributeError,
                AssertionError) as error:  # fmt: skip
            defined = self._expanded(node, inputs)
            if defined is not None:
                return defined
            raise nodes.refused(node, error) from error
        return [self._value_of(node, item) for item in self._items(made, len(node.output))]

    def _bounded(self, node: onnx.NodeProto, inputs: list[Value | None], operand: Any) -> Any:
        """The indices of an operator that reads or writes what they say, none of them out of range."""
        data, indices = inputs[0], inputs[1]
        if data is None or indices is None or not data.shape or indices.shape is None:
            return operand
        attributes = {a.name: a.i for a in node.attribute}
        bounds = index_bounds.extents(
            node.op_type, data.shape, indices.shape, attributes.get("axis", 0), attributes.get("batch_dims", 0)
        )
        if indices.const is None:
            return index_bounds.clipped(self.builder, operand, bounds, indices.dtype)
        if not index_bounds.within(indices.const, bounds):
            raise nodes.refused(node, "a constant index is out of range")
        return operand

    def _operands(self, node: onnx.NodeProto, inputs: list[Value | None]) -> list[Any]:
        """In ONNX's element types; as they are stored where elements only move."""
        if node.op_type in _MOVES:
            stored = [None if value is None else self.builder.moved(value) for value in inputs]
            if node.op_type != "Concat" or len({element_type(each) for each in stored if each is not None}) == 1:
                return stored
        return [None if value is None else self.builder.plain(value) for value in inputs]

    def _items(self, made: Any, count: int) -> list[Any]:
        from tvm import relax

        if isinstance(made, relax.Tuple):
            return list(made.fields)
        kind: Any = made.ty
        if isinstance(kind, relax.TupleType):
            whole = self.builder.emit(made)
            return [relax.TupleGetItem(whole, i) for i in range(min(count, len(tuple(made.ty.fields))))]
        return [made]

    def _value_of(self, node: onnx.NodeProto, expression: Any) -> Value:
        import tvm
        from tvm import relax

        if isinstance(expression, tvm.ir.GenericConst):
            literal: Any = expression
            return constant(literal.value.numpy())
        expression = self.builder.emit(expression)
        kind = expression.ty
        if not isinstance(kind, relax.TensorType):
            raise nodes.refused(node, f"its result is {type(kind).__name__}, not a tensor")
        shape = kind.shape
        if not isinstance(shape, relax.ShapeExpr) or any(not isinstance(d, tvm.tirx.IntImm) for d in shape.values):
            raise nodes.dynamic(node)
        dims: Any = shape.values
        stored = self.builder.narrows and str(kind.dtype) == self.builder.precision
        dtype = "float32" if stored else str(kind.dtype)
        if dtype not in DTYPES:
            raise nodes.refused(node, f"{dtype} cannot be compiled")
        whole = tuple(int(d) for d in dims)
        if 0 in whole:  # nothing to compute, and a constant to whoever reads it
            return constant(np.zeros(whole, dtype))
        return Value(whole, dtype, plain=expression)


def _consumers(graph: onnx.GraphProto) -> dict[str, list[onnx.NodeProto | None]]:
    """The nodes that read each value, in graph order, each once; None stands for an output of the graph or a reader in
    a subgraph."""
    found: dict[str, list[onnx.NodeProto | None]] = {}
    for node in graph.node:
        for name in dict.fromkeys(node.input):
            found.setdefault(name, []).append(node)
        for name in _read_inside(node):
            found.setdefault(name, []).append(None)
    for info in graph.output:
        found.setdefault(info.name, []).append(None)
    return found


def _read_inside(node: onnx.NodeProto) -> set[str]:
    """Every name that the subgraphs of a node read, their own included."""
    graphs = [a.g for a in node.attribute if a.HasField("g")]
    found = {name for graph in graphs for inner in graph.node for name in (*inner.input, *_read_inside(inner))}
    return found | {info.name for graph in graphs for info in graph.output}


def _fuses(name: str, consumers: Mapping[str, list[onnx.NodeProto | None]]) -> bool:
    """True when the readers of a value are elementwise and meet in the last of them: x, or x * sigmoid(x)."""
    readers = consumers.get(name, [])
    if not readers or any(node is None or node.op_type not in _FUSED for node in readers):
        return False
    last = readers[-1]
    return all(_leads_to(node, last, consumers) for node in readers[:-1])


def _leads_to(node: Any, last: Any, consumers: Mapping[str, list[onnx.NodeProto | None]]) -> bool:
    """True when a chain of elementwise nodes, each with one reader, goes from `node` to `last`."""
    while node is not last:
        readers = consumers.get(node.output[0], [])
        if len(readers) != 1 or readers[0] is None or readers[0].op_type not in _FUSED:
            return False
        node = readers[0]
    return True


def _padded(node: onnx.NodeProto, inputs: list[Value | None]) -> onnx.NodeProto:
    data, weight = inputs[:2]
    if data is None or weight is None or not data.shape or not weight.shape:
        return node
    return explicit_pads.with_pads(node, data.shape, weight.shape)


def _integers(node: onnx.NodeProto, inputs: list[Value | None], array: np.ndarray) -> Value:
    """A dequantized constant, with the integers it came from."""
    stored, scale, zero_point = (None if v is None else v.const for v in [*inputs, None][:3])
    assert stored is not None and scale is not None
    attributes = {a.name: a.i for a in node.attribute}
    axis, block = attributes.get("axis", 1), attributes.get("block_size", 0)
    if block:
        blocks = block_weights.blocks_of(array, stored, scale, zero_point, axis, block)
        return constant(array) if blocks is None else blocks
    if zero_point is None:
        zero_point = np.zeros(1, stored.dtype)
    return integer_layers.Integers(array, stored, scale, zero_point, axis)


def _static_type(info: onnx.ValueInfoProto) -> tuple[tuple[int, ...], str]:
    tensor = info.type.tensor_type
    shape: list[int] = []
    if not info.type.HasField("tensor_type"):
        raise TargetError(f"input {info.name!r} is not a tensor", hint="only tensors can be compiled")
    for dim in tensor.shape.dim:
        if not dim.HasField("dim_value") or dim.dim_value < 0:
            raise TargetError(
                f"input {info.name!r} has a dynamic dimension {dim.dim_param or '?'!r}",
                hint=f"fix it: --input '{info.name}:1,...'",
            )
        shape.append(int(dim.dim_value))
    dtype = str(np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)))
    if dtype not in DTYPES:
        raise TargetError(f"input {info.name!r} is {dtype}, which cannot be compiled")
    return tuple(shape), dtype
