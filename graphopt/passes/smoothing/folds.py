"""Who can multiply the features of a value by constants, for nothing: the constants of what makes it."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from graphopt import graph as g
from graphopt.passes.linear_operator import Linear, Unfit, linear_operator, replace_parameters

NORMALIZATIONS = frozenset({"LayerNormalization", "RMSNormalization"})
"""Operators whose second input multiplies, and whose third, if any, is added to, each feature."""
ELEMENTWISE = frozenset({"Relu", "LeakyRelu", "Identity"})
"""f(s x) = s f(x) for s > 0."""
PRECISIONS = (np.dtype(np.float32), np.dtype(np.float64))


@dataclass
class Fold:
    """New constants, not yet in the graph."""

    constants: list[tuple[ir.Node, int, np.ndarray]] = field(default_factory=list)
    """Node, input, and what it reads there from now on (float64)."""
    layers: list[tuple[Linear, np.ndarray, np.ndarray]] = field(default_factory=list)
    """Layer, weights, bias (float64)."""

    def apply(self, model: ir.Model) -> None:
        """Write them, in the precision of the old ones."""
        for node, index, array in self.constants:
            old = node.inputs[index]
            assert old is not None and old.dtype is not None
            stored = array.astype(old.dtype.numpy())
            node.replace_input_with(index, g.add_initializer(model.graph, str(old.name), stored))
        for layer, weight, bias in self.layers:
            dtype = layer.dtype.numpy()
            replace_parameters(model, layer, weight.astype(dtype), bias.astype(dtype))


def find_fold(model: ir.Model, value: ir.Value, factor: np.ndarray) -> Fold:
    """How `value` becomes itself times `factor` (float64, (K,), positive) along its last axis.

    Cases: 1. a normalisation's scale and bias; 2. Gemm, MatMul with or without an Add: columns and bias; 3. Mul or Div
    by a constant; 4. Add or Sub of a constant, when 1 to 6 take the other side; 5. Mul of two computed values, when
    1 to 6 take either; 6. Relu, LeakyRelu, Identity, when 1 to 6 take their input. Raises Unfit.
    """
    fold = Fold()
    _search(model, value, factor, fold)
    return fold


def _search(model: ir.Model, value: ir.Value, factor: np.ndarray, fold: Fold) -> None:
    node = value.producer()
    if node is None or value is not node.outputs[0]:
        raise Unfit(f"{value.name!r} is an input of the model" if node is None else f"{_name(node)} splits it off")
    if g.is_onnx(node, *NORMALIZATIONS):
        for index in range(1, len(node.inputs)):
            if node.inputs[index] is not None:
                fold.constants.append((node, index, _constant(node, index, factor) * factor))
        return
    layer = linear_operator(model, node, any_rank=True)
    if layer is not None and layer.kind in ("Gemm", "MatMul") and layer.result is value:
        _into_layer(layer, factor, fold)
        return
    sides = [g.constant_of(side) is not None for side in node.inputs[:2]]
    if g.is_onnx(node, "Mul", "Add") and any(sides):
        index = sides.index(True)
    elif g.is_onnx(node, "Div", "Sub") and sides[1]:
        index = 1
    else:
        _through(model, node, factor, fold)
        return
    array = _constant(node, index, factor)
    if node.op_type in ("Mul", "Div"):
        if array.size == 1 and (g.dims_of(node.inputs[1 - index]) or (None,))[-1] != len(factor):
            raise Unfit(f"what {_name(node)} multiplies has an unknown number of features")
        fold.constants.append((node, index, array * factor if node.op_type == "Mul" else array / factor))
        return
    _search(model, _alone(node, 1 - index), factor, fold)
    fold.constants.append((node, index, array * factor))


def _through(model: ir.Model, node: ir.Node, factor: np.ndarray, fold: Fold) -> None:
    """Cases 5 and 6."""
    if g.is_onnx(node, *ELEMENTWISE):
        _search(model, _alone(node, 0), factor, fold)
        return
    if not g.is_onnx(node, "Mul"):
        raise Unfit(f"{_name(node)} before it cannot take the scales")
    reasons = []
    for index in (0, 1):
        try:
            found = find_fold(model, _alone(node, index), factor)
        except Unfit as unfit:
            reasons.append(str(unfit))
            continue
        fold.constants += found.constants
        fold.layers += found.layers
        return
    raise Unfit("; ".join(reasons))


def _into_layer(layer: Linear, factor: np.ndarray, fold: Fold) -> None:
    layer.require_constant(_name(layer.node))
    if layer.dtype not in (ir.DataType.FLOAT, ir.DataType.DOUBLE):
        raise Unfit(f"the weights of {_name(layer.node)} are {layer.dtype.name.lower()}, not float32")
    if layer.outputs != len(factor):
        raise Unfit(f"{_name(layer.node)} writes {layer.outputs} features, {len(factor)} are read")
    fold.layers.append((layer, layer.scale_outputs(factor), layer.bias * factor))


def _constant(node: ir.Node, index: int, factor: np.ndarray) -> np.ndarray:
    """float64; one number a feature along its last axis, or one number in all."""
    array = g.constant_of(node.inputs[index])
    if array is None or array.dtype not in PRECISIONS:
        raise Unfit(f"input {index} of {_name(node)} is not a constant in float32")
    if array.size != 1 and array.shape[-1] != len(factor):
        raise Unfit(f"input {index} of {_name(node)} is not one number a feature")
    return array.astype(np.float64)


def _alone(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    assert value is not None
    if value.is_graph_output() or len(value.uses()) != 1:
        raise Unfit(f"{value.name!r}, which {_name(node)} reads, has other readers")
    return value


def _name(node: ir.Node) -> str:
    return f"{node.op_type} {g.label(node)!r}"
