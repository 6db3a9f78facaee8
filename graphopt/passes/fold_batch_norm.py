"""Fold BatchNormalization into the linear operator next to it.

    BatchNormalization(z) = a*z + b     with a = scale / sqrt(var + epsilon),  b = bias - mean*a    (per channel)

Cases:

1. After Conv: W' = a W along M, B' = a B + b.                      W: (M, C/group, kH, kW)
2. After ConvTranspose: the same along M = group x M/group.         W: (C, M/group, kH, kW)
3. After Gemm: B' = a B along N, C' = beta a C + b, beta' = 1.      B: (K, N), or (N, K) with transB
4. After MatMul of matrices, or MatMul + Add of a constant: the same; the bare MatMul becomes a Gemm.
5. Before Conv without padding: W' = W a along C, B' = B + sum over C/group, kH, kW of W b. With padding only if
   b = 0: the zeros of the padding stand for values that BatchNormalization has not shifted.
6. Before ConvTranspose if b = 0, or for a 1x1 kernel with stride 1 and no padding: elsewhere the shift is not the
   same at every place of the output.
7. Before Gemm and MatMul of matrices: B' = a B along K, C' = beta C + alpha b B.

Applies when: the statistics and weights are constant and float16, float32 or float64. Weights that other nodes read too
are copied. The arithmetic is done in float64 and stored in the weights' own type.
Refuses when (each is reported): training mode (training_mode=1; before opset 14 more than one output; before opset 7
is_test=0), statistics per element (spatial=0), parameters or weights computed or open to a caller, a value between the
two that somebody else reads or that is an output of the model, results that are not finite in the weights' type.
Fidelity: ROUNDING.
Reference: Jacob et al., Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference,
CVPR 2018, section 3.2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt import graph as g
from graphopt.passes.base import Context, Fidelity, Pass, PassResult, Skip
from graphopt.passes.linear_operator import Linear, Unfit, linear_operator, replace_parameters

_FLOATS = (ir.DataType.FLOAT16, ir.DataType.FLOAT, ir.DataType.DOUBLE)


class FoldBatchNorm(Pass):
    """Fold BatchNormalization into a neighbouring Conv, ConvTranspose, Gemm or MatMul."""

    fidelity = Fidelity.ROUNDING

    def run(self, model: ir.Model, context: Context) -> PassResult:
        """Fold what can be folded; `applied` counts BatchNormalization nodes removed."""
        with g.remembering_names(model.graph), g.collection_paused():
            return self._run(model)

    def _run(self, model: ir.Model) -> PassResult:
        applied = 0
        refused: dict[ir.Node, str] = {}
        progress = True
        while progress:  # folding one may bring the next one beside an operator
            progress = False
            for node in list(model.graph):
                if not g.is_onnx(node, "BatchNormalization"):
                    continue
                reason = _fold(model, node)
                if reason is None:
                    applied, progress = applied + 1, True
                    refused.pop(node, None)
                else:
                    refused[node] = reason
        g.remove_unused_initializers(model.graph)
        return PassResult(model, applied, tuple(Skip(g.label(node), reason) for node, reason in refused.items()))


@dataclass(frozen=True)
class _Affine:
    """y = a*x + b per channel; float64 vectors of length C."""

    a: np.ndarray
    b: np.ndarray


def _fold(model: ir.Model, node: ir.Node) -> str | None:
    """Fold one BatchNormalization; the reason where that cannot be."""
    try:
        affine = _affine(model, node)
    except Unfit as unfit:
        return str(unfit)
    reasons = []
    for attempt in (_into_producer, _into_consumer):
        try:
            if attempt(model, node, affine):
                return None
        except Unfit as unfit:
            reasons.append(str(unfit))
    return "; ".join(reasons) or "no Conv, ConvTranspose, Gemm or MatMul is next to it"


def _affine(model: ir.Model, node: ir.Node) -> _Affine:
    opset = g.opset_of(model)
    if g.attribute(node, "training_mode", 0) or (opset < 7 and not g.attribute(node, "is_test", 0)):
        raise Unfit("it is in training mode")
    if any(v.name and (v.uses() or v.is_graph_output() or opset < 14) for v in node.outputs[1:]):
        raise Unfit("it is in training mode: it has more than one output")
    if not g.attribute(node, "spatial", 1):
        raise Unfit("its statistics are per element (spatial=0)")
    arrays = []
    for value in node.inputs[1:5]:
        array = g.constant_of(value)
        if array is None:
            open_ = value is not None and value.is_initializer()
            raise Unfit(
                "its parameters are inputs that a caller may override: run simplify first"
                if open_
                else "its parameters are computed, not constant"
            )
        arrays.append(array.astype(np.float64).reshape(-1))
    scale, bias, mean, variance = arrays
    with np.errstate(all="ignore"):
        a = scale / np.sqrt(variance + np.float64(g.attribute(node, "epsilon", 1e-5)))
        b = bias - mean * a
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise Unfit("its scale is not finite (a variance below -epsilon, or not a number)")
    return _Affine(a, b)


def _into_producer(model: ir.Model, node: ir.Node, affine: _Affine) -> bool:
    """Cases 1 to 4; False when the input does not come from a linear operator."""
    value = node.inputs[0]
    producer = value.producer() if value is not None else None
    linear = linear_operator(model, producer) if producer is not None else None
    if linear is None or value is None:
        return False
    where = f"{linear.node.op_type} {g.label(linear.node)!r} before it"
    if g.sole_consumer(value) is not node:
        raise Unfit(f"the result of {where} is read by others too, or is an output of the model")
    linear.require_constant(where)
    if linear.outputs != len(affine.a):
        raise Unfit(f"{where} has {linear.outputs} channels, BatchNormalization {len(affine.a)}")
    weight = linear.scale_outputs(affine.a)
    bias = linear.bias * affine.a + affine.b
    _store(model, linear, weight, bias, where)
    if not g.replace_value(node.outputs[0], linear.result):
        raise AssertionError("the result of a node of this graph can always take the place of another")
    model.graph.remove(node, safe=True)
    return True


def _into_consumer(model: ir.Model, node: ir.Node, affine: _Affine) -> bool:
    """Cases 5 to 7; False when the only reader is no linear operator."""
    value, source = node.outputs[0], node.inputs[0]
    consumer = g.sole_consumer(value)
    if consumer is None or source is None:
        if not any(linear_operator(model, c) for c in value.consumers()):
            return False
        raise Unfit("its own result is read by several nodes, or is an output of the model")
    linear = linear_operator(model, consumer)
    if linear is None or len(value.uses()) != 1 or linear.node.inputs[0] is not value:
        return False
    where = f"{linear.node.op_type} {g.label(linear.node)!r} after it"
    linear.require_constant(where)
    if linear.inputs != len(affine.a):
        raise Unfit(f"{where} reads {linear.inputs} channels, BatchNormalization gives {len(affine.a)}")
    if np.any(affine.b != 0) and not linear.shift_is_uniform():
        raise Unfit(f"{where} pads, or overlaps unevenly: the shift would differ at the border")
    weight = linear.scale_inputs(affine.a)
    bias = linear.bias + linear.response_to(affine.b)
    _store(model, linear, weight, bias, where)
    linear.node.replace_input_with(0, source)
    model.graph.remove(node, safe=True)
    return True


def _store(model: ir.Model, linear: Linear, weight: np.ndarray, bias: np.ndarray, where: str) -> None:
    dtype = linear.dtype
    if dtype not in _FLOATS:
        raise Unfit(f"{where} has weights of type {dtype.name}")
    with np.errstate(over="ignore"):
        stored = weight.astype(dtype.numpy()), bias.astype(dtype.numpy())
    if not all(np.isfinite(array).all() for array in stored) or math.isinf(float(np.max(np.abs(bias), initial=0.0))):
        raise Unfit(f"the folded weights of {where} are not finite in {dtype.name}")
    replace_parameters(model, linear, *stored)
