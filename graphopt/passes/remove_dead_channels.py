"""Cut channels that carry a constant whatever the input, and fold the constant into the layers that read them.

    W x + b  =  W_S x_S + (b + W_D c)      D: the channels that are always c, S: the others

A channel is known to be constant when

1. all weights of its output channel are zero: it is the bias.
2. BatchNormalization scales it by zero: it is the shift.
3. bounds of its inputs and the signs of its weights keep it where a Relu or a Clip cuts it off: it is 0, or the limit.
4. it is computed from constants by element-wise operators, pooling, convolutions without padding, concatenation.

Applies when: every layer that reads the channel, and every other channel that is coupled with it (by a residual Add,
say), reads the same constant at all places. A constant other than zero is folded into the bias of the reader, which
must not pad: its border sees zeros instead.
Refuses when: the channels must be kept for another reason (see prune-channels), the reader pads or has no bias
(MatMul), or it is the last channel of a value.
Fidelity: ROUNDING. The terms that are left are the same, sums of them may be taken in another order, and constants
other than zero move into the bias. Inputs are taken to be finite: infinity times a zero weight is not a number.
Reference: Fang et al., DepGraph: Towards Any Structural Pruning, CVPR 2023, for the channels that depend on each other.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphopt import graph as g
from graphopt.passes.base import Context, Fidelity, Pass, PassResult, Skip
from graphopt.passes.channels.bounds import channel_bounds
from graphopt.passes.channels.dependency import ChannelGraph
from graphopt.passes.channels.families import Room
from graphopt.passes.channels.plan import Plan
from graphopt.passes.channels.reconstruction import add_to_bias
from graphopt.passes.linear_operator import linear_operator


class RemoveDeadChannels(Pass):
    """Cut channels whose values never change."""

    fidelity = Fidelity.ROUNDING

    def run(self, model: ir.Model, context: Context) -> PassResult:
        """Cut what can be cut; `applied` counts the classes of coupled channels that are gone."""
        channels = ChannelGraph(model)
        readers = _readers(channels)
        room, cut, skipped = Room(channels, 1), set[int](), []
        for root, seen in sorted(readers.items()):
            if not all(np.isfinite(low) and low == high for _, _, low, high in seen):
                continue
            node = seen[0][0]
            reason = channels.classes.frozen(root)
            for reader, _, constant, _ in seen:
                reason = reason or (None if constant == 0 else _unfoldable(model, reader))
            if reason is None and not room.take([root]):
                reason = "it is the last channel of a value"
            if reason is not None:
                skipped.append(Skip(g.label(node), f"reads a constant channel that stays: {reason}"))
            else:
                cut.add(root)
        if cut:
            _fold(channels, readers, cut)
            Plan(channels, frozenset(cut)).apply()
        return PassResult(model, len(cut), tuple(dict.fromkeys(skipped)))


Seen = tuple[ir.Node, int, float, float]


def _readers(channels: ChannelGraph) -> dict[int, list[Seen]]:
    """By class: the layers that read it, at which input channel, and the bounds of what they see there."""
    bounds = channel_bounds(channels)
    found: dict[int, list[Seen]] = {}
    for site in channels.reads:
        value = site.node.inputs[0]
        if value is None or value not in bounds:
            continue
        roots = channels.classes.roots(channels.carried[value].labels).tolist()
        for index, (root, low, high) in enumerate(zip(roots, *bounds[value], strict=True)):
            found.setdefault(root, []).append((site.node, index, float(low), float(high)))
    return found


def _unfoldable(model: ir.Model, node: ir.Node) -> str | None:
    """Why a constant other than zero cannot move into the node's bias."""
    linear = linear_operator(model, node)
    if linear is None or node.op_type == "MatMul":
        return f"{node.op_type} {g.label(node)!r} has no bias to take its constant"
    if not linear.shift_is_uniform():
        return f"{node.op_type} {g.label(node)!r} pads: at the border it does not see the constant"
    return None


def _fold(channels: ChannelGraph, readers: dict[int, list[Seen]], cut: set[int]) -> None:
    shifts: dict[ir.Node, dict[int, float]] = {}
    for root in cut:
        for node, index, constant, _ in readers[root]:
            if constant != 0:
                shifts.setdefault(node, {})[index] = constant
    for node, constants in shifts.items():
        linear = linear_operator(channels.model, node)
        assert linear is not None
        shift = np.zeros(linear.inputs)
        shift[list(constants)] = list(constants.values())
        add_to_bias(channels.model.graph, node, linear.response_to(shift))
