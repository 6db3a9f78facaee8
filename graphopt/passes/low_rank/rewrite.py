"""Putting the layers of a split where the layer was. The node's readers, its Relu among them, see no difference."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from graphopt import graph as g
from graphopt.passes.copied_layer import copy_with, layer_in
from graphopt.passes.low_rank.choose import Split
from graphopt.passes.low_rank.problem import Problem
from graphopt.passes.taking_over import take_over

SUFFIX = "_split"
"""New nodes are called NODE_split1, NODE_split2, ..."""


def replace(model: ir.Model, problem: Problem, split: Split, shift: np.ndarray | None) -> None:
    """Replace the layer. `shift`: what its bias gains, one value an output channel."""
    graph, old = model.graph, problem.layer.node
    base, weight_name = g.label(old), str(old.inputs[1].name) if old.inputs[1] is not None else "weight"
    bias = _own_bias(problem, shift)
    value = problem.layer.input
    last = len(split.stages) - 1
    for index in range(last + 1):
        weight = split.weights[index].astype(np.float32)
        stored, op_type, attributes = _as_stored(model, problem, split, index, weight)
        inputs = [value, g.add_initializer(graph, f"{weight_name}{SUFFIX}{index + 1}", stored)]
        if index == last and bias is not None:
            inputs.append(g.add_initializer(graph, f"{weight_name}{SUFFIX}_bias", bias))
        name = g.fresh_name(graph, f"{base}{SUFFIX}{index + 1}")
        node = ir.node(op_type, inputs, attributes, name=name)
        graph.insert_before(old, node)
        value = node.outputs[0]
        value.type = ir.TensorType(ir.DataType.FLOAT)
        if index < last:
            value.name = g.fresh_name(graph, f"{old.outputs[0].name}{SUFFIX}{index + 1}")
    if old.op_type == "MatMul" and shift is not None:
        value = _shifted(graph, problem, value, shift)
    take_over(graph, old, value)


def copy_with_split(model: ir.Model, problem: Problem, split: Split, shift: np.ndarray | None) -> ir.Model:
    """A copy of `model` with this layer alone replaced."""
    copy, counterpart = copy_with(model)
    replace(copy, dataclasses.replace(problem, layer=layer_in(counterpart, problem.layer)), split, shift)
    g.remove_unused_initializers(copy.graph)
    return copy


def _own_bias(problem: Problem, shift: np.ndarray | None) -> np.ndarray | None:
    """The bias of the last Conv or Gemm, float32 (channels,); None where it has none."""
    node = problem.layer.node
    if node.op_type == "MatMul":
        return None
    held = g.constant_of(g.input_of(node, 2))
    if held is None and shift is None:
        return None
    channels = problem.groups * problem.shape.outputs
    bias = np.zeros(channels) if held is None else np.broadcast_to(held.reshape(-1).astype(np.float64), (channels,))
    beta = float(g.attribute(node, "beta", 1.0)) if node.op_type == "Gemm" else 1.0
    return (beta * bias + (0.0 if shift is None else shift)).astype(np.float32)


def _as_stored(
    model: ir.Model, problem: Problem, split: Split, index: int, weight: np.ndarray
) -> tuple[np.ndarray, str, dict]:
    """The weights of a stage as its operator wants them, the operator, its attributes."""
    node = problem.layer.node
    if node.op_type == "Conv":
        stage = split.stages[index]
        groups = problem.groups * (stage.outputs if stage.depthwise else 1)
        return (
            weight.reshape(-1, *weight.shape[2:]),
            "Conv",
            _conv_attributes(node, stage.axes, weight.shape[3:], groups),
        )
    (rows,) = weight
    if node.op_type == "MatMul" or (index == 0 and g.opset_of(model) < 11):  # a Gemm needed a bias then
        return rows.T, "MatMul", {}
    if g.attribute(node, "transB", 0):
        return rows, "Gemm", {"transB": 1}
    return rows.T, "Gemm", {}


def _conv_attributes(node: ir.Node, axes: tuple[int, ...], kernel: tuple[int, ...], groups: int) -> dict:
    rank = len(kernel)
    strides, dilations = (g.attribute(node, name, (1,) * rank) for name in ("strides", "dilations"))
    attributes: dict = {
        "kernel_shape": list(kernel),
        "strides": [s if axis in axes else 1 for axis, s in enumerate(strides)],
        "dilations": [d if axis in axes else 1 for axis, d in enumerate(dilations)],
        "group": groups,
    }
    auto = g.attribute(node, "auto_pad", "NOTSET")
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        if axes:
            attributes["auto_pad"] = auto  # along other axes, kernel and stride are 1: it pads nothing there
    elif auto == "NOTSET":
        pads = g.attribute(node, "pads", (0,) * (2 * rank))
        attributes["pads"] = [p if place % rank in axes else 0 for place, p in enumerate(pads)]
    return attributes


def _shifted(graph: ir.Graph, problem: Problem, value: ir.Value, shift: np.ndarray) -> ir.Value:
    """A MatMul's shift: into the constant of the Add behind it, or an Add of its own; the value to read instead."""
    node = problem.layer.node
    name = f"{node.inputs[1].name if node.inputs[1] is not None else 'weight'}{SUFFIX}_bias"
    if problem.layer.bias is not None:
        add, slot = problem.layer.bias
        held = g.constant_of(add.inputs[slot])
        assert held is not None
        moved = (held.astype(np.float64) + shift).astype(np.float32)
        add.replace_input_with(slot, g.add_initializer(graph, name, moved))
        return value
    bias = g.add_initializer(graph, name, shift.astype(np.float32))
    value.name = g.fresh_name(graph, f"{node.outputs[0].name}{SUFFIX}2")
    add = ir.node("Add", [value, bias], name=g.fresh_name(graph, f"{g.label(node)}{SUFFIX}_add"))
    graph.insert_before(node, add)
    add.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    return add.outputs[0]
