"""The channels of every value of a graph, and which of them must be kept or cut together.

Each value may carry labels along one axis. An operator with weights over all its inputs (Conv, Gemm, MatMul) makes new
labels, and reads those of its input: there a channel may end. Everything else hands labels on: where two values meet
element by element their labels become one class, concatenation and slicing put labels together and apart as they do
values. A label that reaches an operator of unknown effect, an output of the model, or a shape that is computed, is
frozen. A class of labels that is not frozen can be cut: every value then loses whole slices of its axis, the same ones
wherever values meet.

Reference: Fang et al., "DepGraph: Towards Any Structural Pruning", CVPR 2023. Labels that move with the values take
the place of its index mappings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt import graph as g
from graphopt.passes.channels.classes import Classes
from graphopt.passes.channels.edits import Edit, SliceConstant
from graphopt.shapes.dimensions import Dim, Size
from graphopt.shapes.inference import infer_facts


@dataclass(frozen=True)
class Carried:
    """The labels of a value: one for each index of `axis`."""

    axis: int
    labels: np.ndarray


@dataclass(frozen=True)
class Site:
    """A node with weights and the labels of the channels that it reads or writes.

    `axis`: of the weights, which counts these channels. For a grouped convolution that counts channels within a group,
    `labels` are those of the first group; they are the same in all groups.
    """

    node: ir.Node
    labels: np.ndarray
    axis: int


Rule = Callable[["ChannelGraph", ir.Node], None]


class ChannelGraph:
    """The labels of a model's main graph. `model` is not changed; its nodes are those of `edits`."""

    def __init__(self, model: ir.Model, exclude: Iterable[str] = ()):
        from graphopt.passes.channels.rules import RULES

        self.model = model
        self.opset = g.opset_of(model)
        self.classes = Classes()
        self.carried: dict[ir.Value, Carried] = {}
        self.edits: list[Edit] = []
        self.reads: list[Site] = []
        """Where channels end: every value of the input's channels is multiplied by weights and summed."""
        self.writes: list[Site] = []
        """Where weights have a slice for each channel of the output, depthwise convolutions included."""
        scratch = model.clone()
        facts = infer_facts(scratch)
        self._shapes: dict[str, tuple[Size, ...] | None] = {
            str(v.name): facts.shape(v) for n in scratch.graph for v in (*n.inputs, *n.outputs) if v is not None
        }
        self._contents = {str(v.name): facts.content(v) for n in scratch.graph for v in n.inputs if v is not None}
        excluded = set(exclude)
        for node in model.graph:
            rule = RULES.get(node.op_type) if g.is_onnx(node) and not g.holds_subgraphs(node) else None
            if rule is None:
                self.freeze_inputs(node, f"{node.op_type} {g.label(node)!r} may mix channels")
            else:
                rule(self, node)
            if g.label(node) in excluded:
                for value in (*node.inputs, *node.outputs):
                    self.freeze(value, f"{g.label(node)!r} is excluded")
        self._freeze_borders()

    # -- what rules ask ----------------------------------------------------------------------------------------------

    def shape(self, value: ir.Value | None) -> tuple[Size, ...] | None:
        """The dimensions of a value, unknown ones as polynomials; None when even the rank is unknown."""
        return None if value is None else self._shapes.get(str(value.name))

    def content(self, value: ir.Value | None) -> np.ndarray | None:
        """What is known of an integer vector: an object array of integers and polynomials."""
        return None if value is None else self._contents.get(str(value.name))

    def ints(self, value: ir.Value | None) -> list[int] | None:
        """A constant integer vector."""
        return g.integers_of(value)

    def labels_of(self, value: ir.Value | None, axis: int, reason: str) -> np.ndarray | None:
        """The labels that `value` carries along `axis`; labels along another axis are frozen."""
        found = self.carried.get(value) if value is not None else None
        if found is None or found.axis == axis:
            return None if found is None else found.labels
        self.freeze(value, reason)
        return None

    # -- what rules do -----------------------------------------------------------------------------------------------

    def carry(self, value: ir.Value | None, axis: int, labels: np.ndarray, rank: int | None = None) -> None:
        """`value` carries these labels. An axis of length 1 carries none: it is what broadcasting stretches.

        `rank`: what is known of its shape where inference knows nothing, so that channels can be followed on.
        """
        if value is None or not value.name:
            return
        if self.shape(value) is None and rank is not None:
            sizes: list[Size] = [Dim.named(f"#{value.name}#{a}") for a in range(rank)]
            sizes[axis] = len(labels)
            self._shapes[value.name] = tuple(sizes)
        if len(labels) > 1:
            self.carried[value] = Carried(axis, labels)
        else:
            self.classes.freeze(labels, f"{value.name!r} has one channel")

    def freeze(self, value: ir.Value | None, reason: str) -> None:
        """The channels that `value` carries are never cut."""
        found = self.carried.get(value) if value is not None else None
        if found is not None:
            self.classes.freeze(found.labels, reason)

    def freeze_inputs(self, node: ir.Node, reason: str) -> None:
        for value in node.inputs:
            self.freeze(value, reason)

    def frozen_labels(self, count: int, reason: str) -> np.ndarray:
        labels = self.classes.fresh(count)
        self.classes.freeze(labels, reason)
        return labels

    def slice(self, node: ir.Node, index: int, axis: int, labels: np.ndarray) -> None:
        """The constant input at `index` has one slice along `axis` for each label."""
        self.edits.append(SliceConstant(node, index, axis, labels))

    # ----------------------------------------------------------------------------------------------------------------

    def _freeze_borders(self) -> None:
        graph = self.model.graph
        for value in self.carried:
            if value.is_graph_output():
                self.freeze(value, f"{value.name!r} is an output of the model")
            for usage in value.uses():
                if usage.node.graph is not graph:
                    self.freeze(value, f"{value.name!r} is read inside a subgraph")
