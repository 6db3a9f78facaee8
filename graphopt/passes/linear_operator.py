"""Conv, ConvTranspose, Gemm and MatMul seen alike: channels in, channels out, weights and a bias per output channel."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from graphopt import graph as g


class Unfit(Exception):
    """Why a rewrite cannot be done here; always turned into a Skip, never shown as an error."""


@dataclass
class Linear:
    """A linear operator; `weight` and `bias` are float64, or None when they are not constant.

    `bias` has one element per output channel (beta of a Gemm multiplied in), or the shape of the output of a Gemm whose
    C differs from row to row.
    """

    node: ir.Node
    """The operator itself: what reads the data."""
    result: ir.Value
    """Its output, or the output of the Add that holds a MatMul's bias."""
    weight_value: ir.Value
    bias_value: ir.Value | None
    weight: np.ndarray | None
    bias: np.ndarray = field(default_factory=lambda: np.zeros(1))
    bias_is_constant: bool = True
    group: int = 1
    transposed: bool = False
    """Gemm with transB: weight is (N, K)."""
    adder: ir.Node | None = None

    @property
    def kind(self) -> str:
        return self.node.op_type

    @property
    def dtype(self) -> ir.DataType:
        tensor = g.tensor_of(self.weight_value)
        assert tensor is not None
        return tensor.dtype

    @property
    def _constant(self) -> np.ndarray:
        if self.weight is None:
            raise Unfit(f"the weights of {g.label(self.node)!r} are not constant")
        return self.weight

    def require_constant(self, where: str) -> None:
        """Raises Unfit for weights or a bias that are computed or that a caller may override."""
        if self.weight is None or not self.bias_is_constant:
            part = "weights" if self.weight is None else "bias"
            raise Unfit(f"the {part} of {where} are not constant")

    @property
    def outputs(self) -> int:
        """M of Conv and ConvTranspose, N of Gemm and MatMul."""
        w = self._constant
        if self.kind == "Conv":
            return w.shape[0]
        if self.kind == "ConvTranspose":
            return w.shape[1] * self.group
        return w.shape[0] if self.transposed else w.shape[1]

    @property
    def inputs(self) -> int:
        """C of Conv and ConvTranspose, K of Gemm and MatMul."""
        w = self._constant
        if self.kind == "Conv":
            return w.shape[1] * self.group
        if self.kind == "ConvTranspose":
            return w.shape[0]
        return w.shape[1] if self.transposed else w.shape[0]

    def _grouped(self) -> np.ndarray:
        """The weight as (group, inputs of a group, outputs of a group, taps); a view or a copy."""
        w = self._constant
        taps = math.prod(w.shape[2:])
        if self.kind == "Conv":
            return w.reshape(self.group, w.shape[0] // self.group, w.shape[1], taps).transpose(0, 2, 1, 3)
        if self.kind == "ConvTranspose":
            return w.reshape(self.group, w.shape[0] // self.group, w.shape[1], taps)
        return (w.T if self.transposed else w)[None, :, :, None]

    def _ungrouped(self, grouped: np.ndarray) -> np.ndarray:
        shape = self._constant.shape
        if self.kind == "Conv":
            return grouped.transpose(0, 2, 1, 3).reshape(shape)
        if self.kind == "ConvTranspose":
            return grouped.reshape(shape)
        return grouped[0, :, :, 0].T if self.transposed else grouped[0, :, :, 0]

    def scale_outputs(self, factor: np.ndarray) -> np.ndarray:
        """The weight with output channel m multiplied by factor[m]."""
        return self._ungrouped(self._grouped() * factor.reshape(self.group, 1, -1, 1))

    def scale_inputs(self, factor: np.ndarray) -> np.ndarray:
        """The weight with input channel c multiplied by factor[c]."""
        return self._ungrouped(self._grouped() * factor.reshape(self.group, -1, 1, 1))

    def output_peaks(self) -> np.ndarray:
        """The largest magnitude among the weights of each output channel."""
        return np.abs(self._grouped()).max(axis=(1, 3), initial=0.0).reshape(-1)

    def input_peaks(self) -> np.ndarray:
        """The largest magnitude among the weights of each input channel."""
        return np.abs(self._grouped()).max(axis=(2, 3), initial=0.0).reshape(-1)

    def response_to(self, shift: np.ndarray) -> np.ndarray:
        """What a constant input, shift[c] in channel c, adds to every output channel, where all taps see it."""
        weighted = self._grouped() * shift.reshape(self.group, -1, 1, 1)
        alpha = g.attribute(self.node, "alpha", 1.0) if self.kind == "Gemm" else 1.0
        return np.float64(alpha) * weighted.sum(axis=(1, 3)).reshape(-1)

    def shift_is_uniform(self) -> bool:
        """Whether a constant input gives a constant output, up to the border."""
        if self.kind in ("Gemm", "MatMul"):
            return True
        taps = self._constant.shape[2:]
        if g.attribute(self.node, "auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
            return False
        pads, out_pads = g.attribute(self.node, "pads", ()), g.attribute(self.node, "output_padding", ())
        if any(pads) or any(out_pads):
            return False
        if self.kind == "Conv":
            return True
        return all(t == 1 for t in taps) and all(s == 1 for s in g.attribute(self.node, "strides", ()))


def linear_operator(model: ir.Model, node: ir.Node, *, any_rank: bool = False) -> Linear | None:
    """`node` as a Linear; an Add of a constant to a MatMul counts as that MatMul. None for anything else.

    `any_rank`: also a MatMul of stacks of rows, (..., K) by (K, N), which cannot become a Gemm: its bias, if it has
    none, must stay zero.
    """
    if g.is_onnx(node, "Conv", "ConvTranspose") and len(node.inputs) >= 2:
        return _convolution(node)
    if g.is_onnx(node, "Gemm") and g.opset_of(model) >= 7 and not g.attribute(node, "transA", 0):
        return _gemm(node)
    if g.is_onnx(node, "MatMul") and g.opset_of(model) >= 7:
        return _matmul(node, any_rank)
    if g.is_onnx(node, "Add"):
        return _matmul_add(model, node, any_rank)
    return None


def _convolution(node: ir.Node) -> Linear | None:
    weight_value, bias_value = node.inputs[1], g.input_of(node, 2)
    if weight_value is None:
        return None
    weight, bias = _float64(weight_value), _float64(bias_value)
    group = g.attribute(node, "group", 1)
    linear = Linear(node, node.outputs[0], weight_value, bias_value, weight, group=group)
    return _with_bias(linear, bias)


def _gemm(node: ir.Node) -> Linear | None:
    weight_value, bias_value = node.inputs[1], g.input_of(node, 2)
    if weight_value is None:
        return None
    bias = _float64(bias_value)
    if bias is not None:
        bias = bias * np.float64(g.attribute(node, "beta", 1.0))
    linear = Linear(
        node,
        node.outputs[0],
        weight_value,
        bias_value,
        _float64(weight_value),
        transposed=bool(g.attribute(node, "transB", 0)),
    )
    return _with_bias(linear, bias)


def _matmul(node: ir.Node, any_rank: bool) -> Linear | None:
    """A product of two matrices with the weights on the right."""
    data, weight_value = node.inputs[0], node.inputs[1]
    if weight_value is None or len(g.dims_of(weight_value) or ()) != 2:
        return None
    if not any_rank and len(g.dims_of(data) or ()) != 2:
        return None
    return _with_bias(Linear(node, node.outputs[0], weight_value, None, _float64(weight_value)), None)


def _matmul_add(model: ir.Model, node: ir.Node, any_rank: bool) -> Linear | None:
    for data, addend in ((0, 1), (1, 0)):
        value, bias_value = node.inputs[data], node.inputs[addend]
        producer = value.producer() if value is not None else None
        if producer is None or value is None or not g.is_onnx(producer, "MatMul") or g.sole_consumer(value) is not node:
            continue
        linear = linear_operator(model, producer, any_rank=any_rank)
        bias = _float64(bias_value)
        if linear is None or bias is None or linear.weight is None:
            continue
        if (
            bias.ndim > 2
            or (bias.ndim == 2 and bias.shape[0] != 1)
            or bias.shape[-1:] not in ((), (1,), (linear.outputs,))
            or (bias.ndim == 2 and len(g.dims_of(value) or ()) < 2)  # it would add a dimension
        ):
            continue
        linear.result, linear.bias_value, linear.adder = node.outputs[0], bias_value, node
        return _with_bias(linear, bias)
    return None


def _with_bias(linear: Linear, bias: np.ndarray | None) -> Linear:
    if linear.bias_value is not None and bias is None:
        linear.bias_is_constant = False
    elif linear.weight is not None:
        channels = linear.outputs
        if bias is None:
            linear.bias = np.zeros(channels)
        elif bias.ndim <= 1 or bias.shape[0] == 1:
            linear.bias = np.broadcast_to(bias.reshape(-1), (channels,))
        else:  # Gemm's C of shape (M, N) or (M, 1)
            linear.bias = np.broadcast_to(bias, (bias.shape[0], channels))
    return linear


def _float64(value: ir.Value | None) -> np.ndarray | None:
    array = g.constant_of(value)
    return None if array is None or array.dtype.kind not in "fV" else array.astype(np.float64)


def replace_parameters(model: ir.Model, linear: Linear, weight: np.ndarray, bias: np.ndarray) -> None:
    """Give the operator these weights and this bias; initializers that others read are left to them.

    A MatMul without an Add becomes a Gemm in place; a Gemm's beta becomes 1.
    """
    graph, node = model.graph, linear.node
    name = str(linear.weight_value.name)
    node.replace_input_with(1, _updated(graph, linear.weight_value, weight, name))
    if linear.adder is not None:
        slot = 0 if linear.adder.inputs[0] is linear.bias_value else 1
        assert linear.bias_value is not None
        linear.adder.replace_input_with(slot, _updated(graph, linear.bias_value, bias, f"{name}_bias"))
        return
    if linear.bias_value is None and linear.kind in ("MatMul", "Gemm") and not np.any(bias):
        return
    if linear.bias_value is None:
        new_bias = g.add_initializer(graph, f"{name}_bias", bias)
    else:
        new_bias = _updated(graph, linear.bias_value, bias, f"{name}_bias")
    if linear.kind == "MatMul":
        _to_gemm(graph, linear, new_bias)
        return
    if len(node.inputs) < 3:
        node.resize_inputs(3)
    node.replace_input_with(2, new_bias)
    if linear.kind == "Gemm":
        node.attributes.pop("beta", None)


def _updated(graph: ir.Graph, old: ir.Value, array: np.ndarray, name: str) -> ir.Value:
    """`old` with new contents where it is an initializer with one reader, else a fresh initializer."""
    own = old.is_initializer() and not old.is_graph_output() and len(old.uses()) == 1
    if not own:
        return g.add_initializer(graph, name, array)
    old.const_value = ir.Tensor(np.ascontiguousarray(array), name=old.name)
    old.shape = ir.Shape(array.shape)
    return old


def _to_gemm(graph: ir.Graph, linear: Linear, bias: ir.Value) -> None:
    old = linear.node
    gemm = ir.node("Gemm", [*old.inputs, bias], name=old.name)
    value = gemm.outputs[0]
    value.shape, value.type = old.outputs[0].shape, old.outputs[0].type
    name = old.outputs[0].name
    graph.insert_before(old, gemm)
    g.replace_value(old.outputs[0], value)
    old.outputs[0].name, value.name = None, name
    graph.remove(old, safe=True)
    linear.node, linear.result = gemm, value
