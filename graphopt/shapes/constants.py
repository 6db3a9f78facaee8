"""Evaluate every node whose inputs are constants, with ONNX Runtime's own kernels.

The kernels are the ones that would have run (graph optimisations off), so folding moves a computation and
changes no bit of it. Values are computed as far as they go; only those that something else still reads are
written to the model, and only if that does not bloat it.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from graphopt import graph as g
from graphopt.shapes import moving

NONDETERMINISTIC = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli"}
)
_WORKING_LIMIT_BYTES = 256 << 20
"""No intermediate larger than this is computed, whatever is kept of it in the end."""


def ort_refusals() -> tuple[type[Exception], ...]:
    """What ONNX Runtime raises for a model or an input that it does not take."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state  # pyright: ignore[reportAttributeAccessIssue]

    own = ("EPFail", "Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NotImplemented", "RuntimeException")
    return (*(getattr(state, name) for name in own), RuntimeError, ValueError, TypeError)


MERGED_CONSTANT_BYTES = 1024
"""Small constants are merged so that the nodes reading them compare equal; large weights keep their names."""


def lift_constants(model: ir.Model, merge: bool = False) -> int:
    """Turn Constant nodes of the main graph into initializers of the same name; returns how many.

    `merge`: small equal ones become one initializer, of the first's name.
    """
    lifted: list[ir.Node] = []
    first: dict[tuple, ir.Value] = {}
    for node in model.graph:
        if node.op_type != "Constant" or not g.is_onnx(node) or node.outputs[0].is_graph_output():
            continue
        old = node.outputs[0]
        tensor = g.tensor_of(old)
        if tensor is None or tensor.dtype == ir.DataType.STRING:  # None: sparse, or an argument of a function
            continue
        lifted.append(node)
        key = small_content(tensor, MERGED_CONSTANT_BYTES) if merge else None
        same = None if key is None else first.get(key)
        if same is not None:
            old.replace_all_uses_with(same)
            continue
        # A new tensor, since a clone of the model may share the old one, and naming it would name it there too.
        named = ir.Tensor(tensor.numpy(), dtype=tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=old.name)
        new = _become_initializer(model.graph, old, named)
        if key is not None:
            first[key] = new
    model.graph.remove(lifted, safe=True)
    return len(lifted)


def small_content(tensor: ir.TensorProtocol, limit: int) -> tuple | None:
    """Type, shape and bytes of a constant, which tell it from others; None of text and of more than `limit` bytes."""
    if isinstance(tensor, ir.TensorProtoTensor) and tensor.raw.HasField("raw_data"):
        proto = tensor.raw  # most are of this kind, and decoding them takes longer than everything else here
        dims = tuple(proto.dims)
        if math.prod(dims) > 4 * limit:  # of two bits; looking at raw_data copies it
            return None
        return (proto.data_type, dims, proto.raw_data) if len(proto.raw_data) <= limit else None
    if tensor.dtype == ir.DataType.STRING or tensor.nbytes > limit:
        return None
    return tensor.dtype, tuple(tensor.shape.numpy()), tensor.tobytes()


def fold_constants(
    model: ir.Model,
    max_folded_bytes: int,
    given: Collection[str] = (),
    computed: dict[str, tuple[int | None, ...]] | None = None,
) -> int:
    """Replace nodes that depend on no input by what they compute; returns how many went.

    A result is stored if it has at most `max_folded_bytes` bytes, or if it takes no more room than the
    initializers it makes superfluous, of those named in `given`: the ones the model came with, so that a large
    result cannot come in by way of its parts. Otherwise its node stays, fed by constants. `computed` is given the
    shapes of all values that were evaluated, by name.
    """
    evaluator = _Evaluator(model)
    known: dict[ir.Value, np.ndarray] = {}
    foldable: list[ir.Node] = []
    for node in model.graph:
        operands: list[np.ndarray | None] = []
        for value in node.inputs:
            array = known.get(value) if value is not None else None
            array = g.constant_of(value) if array is None else array
            if value is not None and array is None:
                break
            operands.append(array)
        else:
            if not _may_fold(node):
                continue
            results = evaluator.run(node, operands)
            if results is not None:
                known.update(zip((v for v in node.outputs if v.name), results, strict=True))
                foldable.append(node)
    if computed is not None:
        computed.update((str(v.name), array.shape) for v, array in known.items())
    wanted = _stored(foldable, known, max_folded_bytes, given)
    folded = 0
    for node in foldable:
        if all(v in wanted or not _is_read(v) for v in node.outputs):
            for value in node.outputs:
                if _is_read(value):
                    array = known[value]
                    tensor = ir.Tensor(np.ascontiguousarray(array).reshape(array.shape), name=value.name)
                    _become_initializer(model.graph, value, tensor)
            model.graph.remove(node, safe=True)
            folded += 1
    return folded + _remove_dead(model, foldable)


def _is_read(value: ir.Value) -> bool:
    return bool(value.uses()) or value.is_graph_output()


def _remove_dead(model: ir.Model, nodes: list[ir.Node]) -> int:
    removed = 0
    for node in reversed(nodes):
        if node.graph is not None and not any(_is_read(v) for v in node.outputs):
            model.graph.remove(node, safe=True)
            removed += 1
    return removed


def _stored(foldable: list[ir.Node], known: dict[ir.Value, np.ndarray], limit: int, given: Collection[str]):
    """The computed values to keep as initializers: those that nodes which stay will read, walking backwards."""
    members = set(foldable)
    stored: set[ir.Value] = set()
    for node in reversed(foldable):
        read = [v for v in node.outputs if v.is_graph_output() or any(u.node not in members for u in v.uses())]
        if not read:
            continue
        room = max(limit, _freed_bytes(node, members, given))
        if not any(v.is_graph_output() for v in read) and sum(known[v].nbytes for v in read) <= room:
            stored.update(read)
        else:
            members.discard(node)  # it stays; whatever feeds it is read by a node that stays
    return stored


def _freed_bytes(node: ir.Node, members: set[ir.Node], given: Collection[str]) -> int:
    """Bytes of the initializers that only foldable nodes on the way to `node` read."""
    total, seen, stack = 0, {node}, [node]
    while stack:
        for value in stack.pop().inputs:
            if value is None:
                continue
            producer = value.producer()
            if producer is not None:
                if producer in members and producer not in seen:
                    seen.add(producer)
                    stack.append(producer)
            elif value.const_value is not None and value.name in given and all(u.node in seen for u in value.uses()):
                total += value.const_value.nbytes
    return total


def _become_initializer(graph: ir.Graph, old: ir.Value, tensor: ir.TensorProtocol) -> ir.Value:
    """Give the readers of `old` an initializer with its name; the caller removes the node that made it."""
    new = ir.Value(
        name=old.name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    old.replace_all_uses_with(new)
    old.const_value = None  # or forgetting the name would take it from the tensor, which a clone may share
    old.name = None
    graph.register_initializer(new)
    return new


def _may_fold(node: ir.Node) -> bool:
    return (
        g.is_onnx(node)
        and node.op_type not in NONDETERMINISTIC
        and node.op_type not in ("Constant", "QuantizeLinear", "DequantizeLinear", "Optional", "SequenceConstruct")
        and not g.holds_subgraphs(node)
        and all(v.type is None or isinstance(v.type, ir.TensorType) for v in node.outputs)
    )


def _result_bytes(node: ir.Node, operands: list[np.ndarray | None]) -> int | None:
    """What the node will write, where that does not follow from the size of what it reads."""
    first, second, third = [*operands, None, None, None][:3]
    if first is None:
        return None
    try:
        if node.op_type == "ConstantOfShape":
            return 8 * math.prod(int(d) for d in first.reshape(-1))
        if node.op_type == "Expand" and second is not None:
            return first.itemsize * math.prod(np.broadcast_shapes(first.shape, tuple(int(d) for d in second)))
        if node.op_type == "Tile" and second is not None:
            return first.nbytes * math.prod(int(d) for d in second)
        if node.op_type == "Range" and second is not None and third is not None:
            return first.itemsize * max(0, math.ceil((float(second) - float(first)) / float(third)))
    except (ValueError, ZeroDivisionError, TypeError, OverflowError):
        return _WORKING_LIMIT_BYTES + 1
    static = [g.static_shape(v) for v in node.outputs]
    return 8 * sum(math.prod(s) for s in static if s is not None)


class _Evaluator:
    """Runs single nodes; None where ONNX Runtime has no kernel or refuses the operands."""

    def __init__(self, model: ir.Model):
        import onnxruntime as ort

        self._opsets = [onnx.helper.make_opsetid(d, v) for d, v in model.opset_imports.items()]
        self._ir_version = min(max(model.ir_version or 4, 4), 10)
        self._ort = ort
        self._options = ort.SessionOptions()
        self._options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        self._options.intra_op_num_threads = 1
        self._options.inter_op_num_threads = 1
        self._options.log_severity_level = 4
        self._refusals = ort_refusals()
        self._opset = g.opset_of(model)
        self._sessions: dict[bytes, Any] = {}

    def run(self, node: ir.Node, operands: list[np.ndarray | None]) -> list[np.ndarray] | None:
        size = _result_bytes(node, operands)
        if size is not None and size > _WORKING_LIMIT_BYTES:
            return None
        if any(v.dtype is not None and not _plain(v.dtype) for v in (*node.inputs, *node.outputs) if v is not None):
            return None
        moved = moving.moved(node, operands, self._opset)
        if moved is not None:
            return [moved]
        names = ["" if array is None else f"i{k}" for k, array in enumerate(operands)]
        outputs = [f"o{k}" if v.name else "" for k, v in enumerate(node.outputs)]
        proto = onnx.helper.make_node(node.op_type, names, outputs, domain=node.domain)
        proto.attribute.extend(ir.to_proto(a) for a in node.attributes.values())
        feeds = {n: a for n, a in zip(names, operands, strict=True) if a is not None}
        graph = onnx.helper.make_graph(
            [proto],
            "fold",
            [
                onnx.helper.make_tensor_value_info(n, onnx.helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
                for n, a in feeds.items()
            ],
            [onnx.helper.make_empty_tensor_value_info(n) for n in outputs if n],
        )
        single = onnx.helper.make_model(graph, opset_imports=self._opsets, ir_version=self._ir_version)
        content = single.SerializeToString()  # nodes that differ in names only share a session
        try:
            if content not in self._sessions:
                self._sessions[content] = self._ort.InferenceSession(
                    content, self._options, providers=["CPUExecutionProvider"]
                )
            results = self._sessions[content].run(None, feeds)
        except self._refusals:
            return None
        arrays = [r for r in results if isinstance(r, np.ndarray)]
        return arrays if len(arrays) == len(results) else None


def _plain(dtype: ir.DataType) -> bool:
    return dtype in _PLAIN


_PLAIN = frozenset(
    {
        ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BOOL,
        ir.DataType.INT8, ir.DataType.INT16, ir.DataType.INT32, ir.DataType.INT64,
        ir.DataType.UINT8, ir.DataType.UINT16, ir.DataType.UINT32, ir.DataType.UINT64,
    }
)  # fmt: skip
