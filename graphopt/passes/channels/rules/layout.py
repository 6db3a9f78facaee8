"""Operators that move elements without computing: reshapes, transposes, concatenation, space to depth and back."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphopt import graph as g
from graphopt.passes.channels.dependency import Carried, ChannelGraph, Rule
from graphopt.passes.channels.edits import ReplaceInts, ReplacePiece, RepointShape
from graphopt.passes.channels.reshaping import reshape_labels


def reshape(graph: ChannelGraph, node: ir.Node) -> None:
    """Reshape to a constant target, the Shape of a value, or a Concat that holds the channel count as a constant."""
    target = g.input_of(node, 1)
    source = target.producer() if target is not None else None
    moved = _moved(graph, node)
    if moved is None:
        if source is not None and g.is_onnx(source, "Shape"):
            graph.freeze(source.inputs[0], f"its shape is the target of {g.label(node)!r}")
        return
    data, after, out = moved
    if not _retarget(graph, node, data, after, out):
        reason = f"the target shape of {g.label(node)!r} is computed"
        graph.freeze_inputs(node, reason)
        if source is not None and g.is_onnx(source, "Shape"):
            graph.freeze(source.inputs[0], reason)
    graph.carry(node.outputs[0], after.axis, after.labels)


def flatten(graph: ChannelGraph, node: ir.Node) -> None:
    """Flatten, Squeeze and Unsqueeze: the result's shape follows from the input's."""
    moved = _moved(graph, node)
    if moved is not None:
        graph.carry(node.outputs[0], moved[1].axis, moved[1].labels)


def _moved(graph: ChannelGraph, node: ir.Node) -> tuple[Carried, Carried, tuple] | None:
    """The labels before and after a reshape, and the shape after; None where they end here (and are then frozen)."""
    value = node.inputs[0]
    data = graph.carried.get(value) if value is not None else None
    if data is None:
        return None
    before, out = graph.shape(value), graph.shape(node.outputs[0])
    found = None
    if before is not None and out is not None:
        found = reshape_labels(data.labels, data.axis, before, out, graph.classes)
    if found is None or out is None:
        graph.freeze_inputs(node, f"the shapes before and after {g.label(node)!r} are not known, or mix its channels")
        return None
    for row in found.together:
        graph.classes.join_all(row.tolist())
    return data, Carried(found.axis, found.labels), out


def _retarget(graph: ChannelGraph, node: ir.Node, data: Carried, after: Carried, out: tuple) -> bool:
    """Arrange for the target to follow the cut; False where it cannot."""
    value = g.input_of(node, 1)
    if value is None:
        return False
    target = graph.ints(value)
    copies = not g.attribute(node, "allowzero", 0)
    if target is not None:
        old, axis = tuple(target), after.axis

        def cut(kept) -> list[int]:
            new = list(old)
            for place, size in enumerate(old):
                copied = copies and size == 0
                if place == axis and size != -1 and not (copied and data.axis == axis):
                    new[place] = int(kept(after.labels).sum())
                elif copied and place == data.axis != axis:
                    new[place] = out[place]
            return new

        # a dimension that is copied from the cut axis to another place has to become a number
        mixed = copies and data.axis != axis and data.axis < len(old) and old[data.axis] == 0
        if mixed and not isinstance(out[data.axis], int):
            return False
        graph.edits.append(ReplaceInts(node, 1, cut, old))
        return True
    producer = value.producer()
    if producer is None:
        return False
    if g.is_onnx(producer, "Shape") and not producer.attributes:
        alike = _alike(graph, producer.inputs[0], after, out)
        if alike is None:
            return False
        graph.edits.append(RepointShape(node, 1, alike))
        return True
    if not g.is_onnx(producer, "Concat"):
        return False
    place = 0
    for piece, part in enumerate(producer.inputs):
        content = graph.content(part)
        if content is None or content.ndim != 1:
            return False
        if place == after.axis and len(content) == 1:
            literal = graph.ints(part)
            if literal is None:
                return False
            if literal != [-1]:
                graph.edits.append(ReplacePiece(node, 1, piece, after.labels))
            return True
        place += len(content)
    return False


def _alike(graph: ChannelGraph, first: ir.Value | None, after: Carried, out: tuple) -> ir.Value | None:
    """A value of shape `out` that loses as many channels along that axis: `first` if it does, else the latest."""
    wanted = sorted(graph.classes.roots(after.labels).tolist())
    candidates = [first] if first is not None else []
    for value in (*candidates, *reversed(graph.carried)):
        found = graph.carried.get(value)
        fits = found is not None and found.axis == after.axis and graph.shape(value) == out
        if fits and found is not None and sorted(graph.classes.roots(found.labels).tolist()) == wanted:
            return value
    return None


def transpose(graph: ChannelGraph, node: ir.Node) -> None:
    data, shape = _carried(graph, node)
    if data is None or shape is None:
        return
    perm = list(g.attribute(node, "perm", tuple(reversed(range(len(shape))))))
    graph.carry(node.outputs[0], perm.index(data.axis), data.labels, len(shape))


def concat(graph: ChannelGraph, node: ir.Node) -> None:
    """Along the channels: labels one after another. Along another axis: joined, as in an elementwise operator."""
    shapes = [graph.shape(value) for value in node.inputs]
    rank = next((len(shape) for shape in shapes if shape is not None), 0)
    found = [graph.carried.get(value) if value is not None else None for value in node.inputs]
    known = [each for each in found if each is not None]
    if not known:
        return
    axis = g.attribute(node, "axis", 1 if graph.opset < 4 else 0) % max(rank, 1)
    reason = f"{g.label(node)!r} puts it beside a value without channels to cut, or along another axis"
    if any(each.axis != known[0].axis for each in known):
        graph.freeze_inputs(node, reason)
        return
    if known[0].axis != axis:
        if len(known) < len(found) or any(len(each.labels) != len(known[0].labels) for each in known):
            graph.freeze_inputs(node, reason)
        else:
            for each in known[1:]:
                graph.classes.join_arrays(known[0].labels, each.labels)
        graph.carry(node.outputs[0], known[0].axis, known[0].labels, rank)
        return
    parts = []
    for each, shape in zip(found, shapes, strict=True):
        size = shape[axis] if shape is not None else None
        if each is None and not isinstance(size, int):
            graph.freeze_inputs(node, reason)
            return
        parts.append(each.labels if each is not None else graph.frozen_labels(int(str(size)), reason))
    graph.carry(node.outputs[0], axis, np.concatenate(parts), rank)


def tile(graph: ChannelGraph, node: ir.Node) -> None:
    """Tile and Expand that leave the channels' axis as it is."""
    data, shape = _carried(graph, node)
    if data is None or shape is None:
        return
    counts = graph.ints(g.input_of(node, 1))
    axis = data.axis if node.op_type == "Tile" else data.axis - len(shape)
    if counts is None or len(counts) < (len(shape) if node.op_type == "Tile" else -axis) or counts[axis] != 1:
        graph.freeze_inputs(node, f"{g.label(node)!r} repeats channels, or by a computed amount")
        return
    rank = len(shape) if node.op_type == "Tile" else max(len(shape), len(counts))
    graph.carry(node.outputs[0], data.axis - len(shape) + rank, data.labels)


def depth_to_space(graph: ChannelGraph, node: ir.Node) -> None:
    """C = b*b*C', in the order (b, b, C') or, mode=CRD, (C', b, b): the channels that make one are cut together."""
    labels = graph.labels_of(node.inputs[0], 1, f"{g.label(node)!r} reads it along another axis")
    if labels is None:
        return
    square = g.attribute(node, "blocksize", 1) ** 2
    rows = labels.reshape(-1, square) if g.attribute(node, "mode", "DCR") == "CRD" else labels.reshape(square, -1).T
    for row in rows:
        graph.classes.join_all(row.tolist())
    graph.carry(node.outputs[0], 1, rows[:, 0])


def space_to_depth(graph: ChannelGraph, node: ir.Node) -> None:
    labels = graph.labels_of(node.inputs[0], 1, f"{g.label(node)!r} reads it along another axis")
    if labels is not None:
        graph.carry(node.outputs[0], 1, np.tile(labels, g.attribute(node, "blocksize", 1) ** 2))


def _carried(graph: ChannelGraph, node: ir.Node) -> tuple[Carried | None, tuple | None]:
    """What the first input carries and its shape; labels of a value of unknown rank are frozen."""
    value = node.inputs[0]
    data, shape = graph.carried.get(value) if value is not None else None, graph.shape(value)
    if data is not None and shape is None:
        graph.freeze(value, f"the rank of {value.name!r} is not known" if value is not None else "")
    return data, shape


LAYOUT: dict[str, Rule] = {
    "Reshape": reshape,
    "Flatten": flatten,
    "Squeeze": flatten,
    "Unsqueeze": flatten,
    "Transpose": transpose,
    "Concat": concat,
    "Tile": tile,
    "Expand": tile,
    "DepthToSpace": depth_to_space,
    "SpaceToDepth": space_to_depth,
}
