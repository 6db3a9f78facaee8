"""Operators with weights: they read channels and write new ones.

A grouped convolution keeps its groups of equal size in one of two ways, whichever leaves more to choose from: whole
groups are cut, with their inputs and outputs (a depthwise convolution always), or the k-th channel of every group is.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphopt import graph as g
from graphopt.passes.channels.dependency import ChannelGraph, Rule, Site
from graphopt.passes.channels.edits import SetGroups


def convolution(graph: ChannelGraph, node: ir.Node) -> None:
    """Conv, W: (M, C/group, ...), and ConvTranspose, W: (C, M/group, ...)."""
    data, weight = node.inputs[0], g.constant_of(node.inputs[1])
    if weight is None or not _constant_or_absent(node, 2):
        graph.freeze_inputs(node, f"the weights of {g.label(node)!r} are not constant")
        return
    groups, transposed = g.attribute(node, "group", 1), node.op_type == "ConvTranspose"
    inputs = weight.shape[0] // groups if transposed else weight.shape[1]
    outputs = weight.shape[1] if transposed else weight.shape[0] // groups
    read = graph.labels_of(data, 1, f"{g.label(node)!r} reads it along another axis")
    if groups == 1:
        written = graph.classes.fresh(outputs)
        in_axis, out_axis = (0, 1) if transposed else (1, 0)
        if read is not None:
            graph.slice(node, 1, in_axis, read)
            graph.reads.append(Site(node, read, in_axis))
        graph.slice(node, 1, out_axis, written)
        graph.writes.append(Site(node, written, out_axis))
    elif groups >= min(inputs, outputs):
        written = _whole_groups(graph, node, read, (groups, inputs, outputs), transposed)
    else:
        written = _within_groups(graph, node, read, (groups, inputs, outputs), transposed)
    graph.slice(node, 2, 0, written)
    graph.carry(node.outputs[0], 1, written, weight.ndim)


def _whole_groups(
    graph: ChannelGraph, node: ir.Node, read: np.ndarray | None, sizes: tuple[int, int, int], transposed: bool
) -> np.ndarray:
    groups, inputs, outputs = sizes
    if read is None:
        read = graph.frozen_labels(groups * inputs, f"the input of {g.label(node)!r} has no channels to cut")
    for group in read.reshape(groups, inputs):
        graph.classes.join_all(group.tolist())
    group = read.reshape(groups, inputs)[:, 0]
    written = np.repeat(group, outputs)
    graph.slice(node, 1, 0, read if transposed else written)
    graph.edits.append(SetGroups(node, group))
    graph.writes.append(Site(node, read if transposed else written, 0))
    return written


def _within_groups(
    graph: ChannelGraph, node: ir.Node, read: np.ndarray | None, sizes: tuple[int, int, int], transposed: bool
) -> np.ndarray:
    groups, inputs, outputs = sizes
    if read is not None:
        for column in read.reshape(groups, inputs).T:
            graph.classes.join_all(column.tolist())
        first = read[:inputs]
        graph.slice(node, 1, 0 if transposed else 1, read if transposed else first)
        graph.reads.append(Site(node, read if transposed else first, 0 if transposed else 1))
    column = graph.classes.fresh(outputs)
    written = np.tile(column, groups)
    graph.slice(node, 1, 1 if transposed else 0, column if transposed else written)
    graph.writes.append(Site(node, column if transposed else written, 1 if transposed else 0))
    return written


def gemm(graph: ChannelGraph, node: ir.Node) -> None:
    """A: (M, K), B: (K, N) or with transB (N, K), C: broadcast to (M, N)."""
    weight, bias = g.constant_of(node.inputs[1]), g.constant_of(g.input_of(node, 2))
    if weight is None or not _constant_or_absent(node, 2) or g.attribute(node, "transA", 0):
        graph.freeze_inputs(node, f"{g.label(node)!r} has computed weights, or transposes its input")
        return
    in_axis, out_axis = (1, 0) if g.attribute(node, "transB", 0) else (0, 1)
    read = graph.labels_of(node.inputs[0], 1, f"{g.label(node)!r} reads it along another axis")
    _matrix(graph, node, read, in_axis, out_axis, weight)
    written = graph.writes[-1].labels
    if bias is not None and bias.ndim and bias.shape[-1] == len(written) > 1:
        graph.slice(node, 2, -1, written)
    graph.carry(node.outputs[0], 1, written, 2)


def matmul(graph: ChannelGraph, node: ir.Node) -> None:
    """(..., K) x (K, N) with constant weights on the right."""
    weight, shape = g.constant_of(node.inputs[1]), graph.shape(node.inputs[0])
    if weight is None or weight.ndim != 2 or shape is None or len(shape) < 2:
        graph.freeze_inputs(node, f"the right factor of {g.label(node)!r} is no constant matrix")
        return
    last, data = len(shape) - 1, graph.carried.get(node.inputs[0]) if node.inputs[0] is not None else None
    if data is not None and data.axis != last:
        graph.carry(node.outputs[0], data.axis, data.labels, last + 1)  # rows of the product are rows of the data
        return
    _matrix(graph, node, None if data is None else data.labels, 0, 1, weight)
    graph.carry(node.outputs[0], last, graph.writes[-1].labels, last + 1)


def _matrix(
    graph: ChannelGraph, node: ir.Node, read: np.ndarray | None, in_axis: int, out_axis: int, weight: np.ndarray
) -> None:
    if read is not None:
        graph.slice(node, 1, in_axis, read)
        graph.reads.append(Site(node, read, in_axis))
    written = graph.classes.fresh(weight.shape[out_axis])
    graph.slice(node, 1, out_axis, written)
    graph.writes.append(Site(node, written, out_axis))


def normalization(graph: ChannelGraph, node: ir.Node) -> None:
    """BatchNormalization and InstanceNormalization: parameters of shape (C,), statistics a channel."""
    labels = graph.labels_of(node.inputs[0], 1, f"{g.label(node)!r} reads it along another axis")
    if labels is None:
        return
    training = g.attribute(node, "training_mode", 0) or (graph.opset < 7 and not g.attribute(node, "is_test", 0))
    constant = all(g.constant_of(v) is not None for v in node.inputs[1:])
    several = any(v.name and (v.uses() or v.is_graph_output()) for v in node.outputs[1:])
    if training or not constant or several or not g.attribute(node, "spatial", 1):
        graph.freeze_inputs(node, f"{g.label(node)!r} is in training mode, or its parameters are not constant")
    else:
        for index in range(1, len(node.inputs)):
            graph.slice(node, index, 0, labels)
    graph.carry(node.outputs[0], 1, labels, _rank(graph, node))


def _rank(graph: ChannelGraph, node: ir.Node) -> int | None:
    shape = graph.shape(node.inputs[0])
    return None if shape is None else len(shape)


def _constant_or_absent(node: ir.Node, index: int) -> bool:
    value = g.input_of(node, index)
    return value is None or g.constant_of(value) is not None


LINEAR: dict[str, Rule] = {
    "Conv": convolution,
    "ConvTranspose": convolution,
    "Gemm": gemm,
    "MatMul": matmul,
    "BatchNormalization": normalization,
    "InstanceNormalization": normalization,
}
