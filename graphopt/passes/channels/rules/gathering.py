"""Operators that pick channels: Split, Slice, Gather. What they pick is counted anew after the cut."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphopt import graph as g
from graphopt.passes.channels.dependency import Carried, ChannelGraph, Rule
from graphopt.passes.channels.edits import Kept, ReplaceInts, set_constant


def split(graph: ChannelGraph, node: ir.Node) -> None:
    """Along the channels: each part has its share; parts of equal size are then written out."""
    value = node.inputs[0]
    data, shape = graph.carried.get(value) if value is not None else None, graph.shape(value)
    if data is None:
        return
    axis, count = g.attribute(node, "axis", 0), len(data.labels)
    sizes = _part_sizes(graph, node, count)
    if shape is None or (axis % len(shape) == data.axis and sizes is None):
        graph.freeze_inputs(node, f"the parts of {g.label(node)!r} are of computed size")
        return
    if axis % len(shape) != data.axis:
        for part in node.outputs:
            graph.carry(part, data.axis, data.labels)
        return
    assert sizes is not None
    parts = np.split(data.labels, np.cumsum(sizes)[:-1])
    for part, labels in zip(node.outputs, parts, strict=True):
        graph.carry(part, data.axis, labels)
        if not (part.name and len(labels) > 1):
            graph.classes.freeze(labels, f"a part of {g.label(node)!r} has one channel")
    graph.edits.append(_SplitSizes(node, tuple(parts), by_attribute=graph.opset < 13))


def _part_sizes(graph: ChannelGraph, node: ir.Node, count: int) -> list[int] | None:
    given = g.attribute(node, "split", None)
    if given is not None:
        return list(given)
    if len(node.inputs) > 1 and node.inputs[1] is not None:
        return graph.ints(node.inputs[1])
    size = -(-count // len(node.outputs))
    return [min(size, count - index * size) for index in range(len(node.outputs))]


class _SplitSizes:
    """Write the sizes of the parts as they are after the cut."""

    def __init__(self, node: ir.Node, parts: tuple[np.ndarray, ...], by_attribute: bool):
        self.node, self.parts, self.by_attribute = node, parts, by_attribute

    def apply(self, graph: ir.Graph, kept: Kept) -> None:
        sizes = [int(kept(part).sum()) for part in self.parts]
        if sizes == [len(part) for part in self.parts]:
            return
        self.node.attributes.pop("num_outputs", None)
        if self.by_attribute:
            self.node.attributes["split"] = ir.AttrInt64s("split", sizes)
        else:
            set_constant(graph, self.node, 1, np.array(sizes, np.int64))


def slice_(graph: ChannelGraph, node: ir.Node) -> None:
    """Along the channels with step 1: the bounds are counted anew."""
    value = node.inputs[0]
    data, shape = graph.carried.get(value) if value is not None else None, graph.shape(value)
    if data is None:
        return
    bounds = _bounds(graph, node, len(shape) if shape is not None else 0)
    if shape is None or bounds is None:
        graph.freeze_inputs(node, f"the bounds of {g.label(node)!r} are computed")
        return
    starts, ends, axes, steps = bounds
    rank, count = len(shape), len(data.labels)
    places = [i for i, axis in enumerate(axes) if axis % rank == data.axis]
    if not places:
        graph.carry(node.outputs[0], data.axis, data.labels)
        return
    place = places[0]
    if steps[place] != 1:
        graph.freeze_inputs(node, f"{g.label(node)!r} takes every {steps[place]}th channel")
        return
    first, last, _ = slice(starts[place], ends[place]).indices(count)
    labels = data.labels[first:last]

    def bound(values: list[int], index: int):
        old = tuple(values)

        def cut(kept: Kept) -> list[int]:
            new = list(old)
            new[place] = int(kept(data.labels[:index]).sum())
            return new

        return cut, old

    by_attribute = graph.opset < 10
    for where, values, index in ((1, starts, first), (2, ends, last)):
        cut, old = bound(values, index)
        if kept_whole(index, count, values[place]):
            continue
        graph.edits.append(ReplaceInts(node, ("starts", "ends")[where - 1] if by_attribute else where, cut, old))
    if len(labels) < 2:
        graph.classes.freeze(labels, f"{g.label(node)!r} takes one channel")
    graph.carry(node.outputs[0], data.axis, labels)


def kept_whole(index: int, count: int, written: int) -> bool:
    """Whether a bound means an end of the axis however long it is: 0, or a number beyond the axis."""
    return (index == 0 and written == 0) or (index == count and written > count)


def _bounds(graph: ChannelGraph, node: ir.Node, rank: int):
    if graph.opset < 10:
        starts, ends = g.attribute(node, "starts", None), g.attribute(node, "ends", None)
        if starts is None or ends is None:
            return None
        axes = g.attribute(node, "axes", tuple(range(len(starts))))
        return list(starts), list(ends), list(axes), [1] * len(starts)
    starts, ends = graph.ints(node.inputs[1]), graph.ints(node.inputs[2])
    if starts is None or ends is None:
        return None
    axes, steps = g.input_of(node, 3), g.input_of(node, 4)
    axes = list(range(len(starts))) if axes is None else graph.ints(axes)
    steps = [1] * len(starts) if steps is None else graph.ints(steps)
    return None if axes is None or steps is None else (starts, ends, axes, steps)


def gather(graph: ChannelGraph, node: ir.Node) -> None:
    """A constant vector of indices, along the channels (a permutation, say) or along another axis."""
    value = node.inputs[0]
    data, shape = graph.carried.get(value) if value is not None else None, graph.shape(value)
    if data is None:
        return
    array = g.constant_of(node.inputs[1])
    if shape is None or array is None or array.ndim > 1:
        graph.freeze_inputs(node, f"the indices of {g.label(node)!r} are computed")
        return
    axis = g.attribute(node, "axis", 0) % len(shape)
    if axis != data.axis:
        graph.carry(node.outputs[0], data.axis - (array.ndim == 0 and axis < data.axis), data.labels)
        return
    if array.ndim == 0:
        graph.freeze_inputs(node, f"{g.label(node)!r} takes one channel")
        return
    indices = [int(i) % len(data.labels) for i in array]
    picked = Carried(data.axis, data.labels[indices])

    def cut(kept: Kept) -> list[int]:
        position = np.cumsum(kept(data.labels)) - 1
        return [int(position[i]) for i, stays in zip(indices, kept(picked.labels), strict=True) if stays]

    graph.edits.append(ReplaceInts(node, 1, cut, tuple(indices)))
    if len(indices) < 2:
        graph.classes.freeze(picked.labels, f"{g.label(node)!r} takes one channel")
    graph.carry(node.outputs[0], data.axis, picked.labels)


GATHERING: dict[str, Rule] = {"Split": split, "Slice": slice_, "Gather": gather}
