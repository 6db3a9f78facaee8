"""Operators that work within channels: pooling, reductions over space, resizing, padding, softmax over other axes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphopt import graph as g
from graphopt.passes.channels.dependency import ChannelGraph, Rule
from graphopt.passes.channels.edits import ReplaceInts


def pooling(graph: ChannelGraph, node: ir.Node) -> None:
    """Over all axes but the first two."""
    labels = graph.labels_of(node.inputs[0], 1, f"{g.label(node)!r} pools along the axis of its channels")
    if len(node.outputs) > 1 and node.outputs[1].uses():
        graph.freeze_inputs(node, f"the indices that {g.label(node)!r} returns count channels")
    if labels is not None:
        shape = graph.shape(node.inputs[0])
        graph.carry(node.outputs[0], 1, labels, None if shape is None else len(shape))


def reduction(graph: ChannelGraph, node: ir.Node) -> None:
    """Over axes that are not the channels'."""
    data, shape = graph.carried.get(_first(node)), graph.shape(node.inputs[0])
    if data is None:
        return
    axes = _axes(graph, node)
    if shape is None or axes is None or data.axis in {a % len(shape) for a in axes} or not axes:
        graph.freeze_inputs(node, f"{node.op_type} {g.label(node)!r} mixes channels")
        return
    dropped = 0 if g.attribute(node, "keepdims", 1) else sum(a % len(shape) < data.axis for a in axes)
    graph.carry(node.outputs[0], data.axis - dropped, data.labels)


def along_one_axis(graph: ChannelGraph, node: ir.Node) -> None:
    """Softmax and the like: every index of the other axes by itself. Before opset 13 over all axes from `axis` on."""
    data, shape = graph.carried.get(_first(node)), graph.shape(node.inputs[0])
    if data is None:
        return
    newer = graph.opset >= 13
    axis = g.attribute(node, "axis", -1 if newer else 1)
    if shape is None or axis % len(shape) == data.axis or (not newer and data.axis > axis % len(shape)):
        graph.freeze_inputs(node, f"{node.op_type} {g.label(node)!r} mixes channels")
        return
    graph.carry(node.outputs[0], data.axis, data.labels, len(shape))


def resize(graph: ChannelGraph, node: ir.Node) -> None:
    """Resize and Upsample that leave the channels' axis as it is; `sizes` counts them and is rewritten."""
    data, shape = graph.carried.get(_first(node)), graph.shape(node.inputs[0])
    if data is None:
        return
    axis, count, sizes = data.axis, len(data.labels), graph.ints(g.input_of(node, 3))
    scales = g.constant_of(g.input_of(node, 1 if node.op_type == "Upsample" or graph.opset == 10 else 2))
    plain = shape is not None and g.attribute(node, "axes", None) is None
    if plain and sizes is not None and len(sizes) == len(shape or ()) and sizes[axis] == count:
        old = tuple(sizes)
        graph.edits.append(
            ReplaceInts(node, 3, lambda kept: [*old[:axis], int(kept(data.labels).sum()), *old[axis + 1 :]], old)
        )
    elif shape is None or not plain or scales is None or scales.size != len(shape) or scales.reshape(-1)[axis] != 1:
        graph.freeze_inputs(node, f"{g.label(node)!r} resizes to a computed size, or along the channels")
        return
    graph.carry(node.outputs[0], axis, data.labels, None if shape is None else len(shape))


def pad(graph: ChannelGraph, node: ir.Node) -> None:
    """Padding of the channels' axis makes channels of a constant, which can be cut like others."""
    data, shape = graph.carried.get(_first(node)), graph.shape(node.inputs[0])
    if data is None:
        return
    axis, by_attribute = data.axis, graph.opset < 11
    pads = list(g.attribute(node, "pads", ())) if by_attribute else graph.ints(g.input_of(node, 1))
    if shape is None or pads is None or len(pads) != 2 * len(shape) or g.input_of(node, 3) is not None:
        graph.freeze_inputs(node, f"{g.label(node)!r} pads by a computed amount, or along named axes")
        return
    before, after = pads[axis], pads[axis + len(shape)]
    if before == after == 0:
        graph.carry(node.outputs[0], axis, data.labels, len(shape))
        return
    if before < 0 or after < 0 or g.attribute(node, "mode", "constant") != "constant":
        graph.freeze_inputs(node, f"{g.label(node)!r} crops or mirrors channels")
        return
    above, below = graph.classes.fresh(before), graph.classes.fresh(after)
    old, second = tuple(pads), axis + len(shape)

    def cut(kept) -> list[int]:
        new = list(old)
        new[axis], new[second] = int(kept(above).sum()), int(kept(below).sum())
        return new

    graph.edits.append(ReplaceInts(node, "pads" if by_attribute else 1, cut, old))
    labels = [part for part in (above, data.labels, below) if len(part)]
    graph.carry(node.outputs[0], axis, np.concatenate(labels), len(shape))


def shape_of(graph: ChannelGraph, node: ir.Node) -> None:
    """Shape follows the cut by itself; whoever computes with the channel count freezes it, but for Reshape's rule."""
    data, shape = graph.carried.get(_first(node)), graph.shape(node.inputs[0])
    if data is None:
        return
    start, end = g.attribute(node, "start", 0), g.attribute(node, "end", None)
    if shape is not None and data.axis not in range(len(shape))[start:end]:
        return
    whole = shape is not None and range(len(shape))[start:end] == range(len(shape))
    for usage in node.outputs[0].uses():
        reader = usage.node
        if whole and shape is not None and g.is_onnx(reader, "Gather") and usage.idx == 0:
            picked = graph.ints(g.input_of(reader, 1))
            if picked is not None and data.axis not in {p % len(shape) for p in picked}:
                continue
        if whole and g.is_onnx(reader, "Reshape") and usage.idx == 1:
            continue  # decided there
        graph.freeze(node.inputs[0], f"{g.label(reader)!r} computes with the number of channels")
    if node.outputs[0].is_graph_output():
        graph.freeze(node.inputs[0], f"{node.outputs[0].name!r} is an output of the model")


def _first(node: ir.Node) -> ir.Value:
    value = node.inputs[0]
    assert value is not None
    return value


def _axes(graph: ChannelGraph, node: ir.Node) -> list[int] | None:
    """The reduced axes; empty means all, None that they are computed."""
    given = g.attribute(node, "axes", None)
    if given is not None:
        return list(given)
    value = g.input_of(node, 1)
    return [] if value is None else graph.ints(value)


_POOLING = ("AveragePool", "GlobalAveragePool", "GlobalLpPool", "GlobalMaxPool", "LpPool", "MaxPool")
_REDUCTIONS = ("ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin",
               "ReduceProd", "ReduceSum", "ReduceSumSquare")  # fmt: skip
WINDOWS: dict[str, Rule] = {
    **dict.fromkeys(_POOLING, pooling),
    **dict.fromkeys(_REDUCTIONS, reduction),
    **dict.fromkeys(("Softmax", "LogSoftmax", "Hardmax"), along_one_axis),
    "Resize": resize,
    "Upsample": resize,
    "Pad": pad,
    "Shape": shape_of,
}
