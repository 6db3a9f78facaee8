"""A layer as a decomposition sees it: groups of plain weights, and how large its input is against its output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from graphopt.graph import attribute, constant_of
from graphopt.passes.low_rank.stages import Shape
from graphopt.passes.quantization.placement import Layer

if TYPE_CHECKING:
    from graphopt.passes.low_rank.inputs import Inputs

Shapes = Mapping[str, tuple[int | None, ...]]


@dataclass(frozen=True, eq=False)
class Problem:
    """`weights`: (groups, outputs, inputs, *kernel) float64 of each group, a Gemm's alpha multiplied in.

    `resolution`: input size over output size along each spatial axis.
    """

    layer: Layer
    weights: np.ndarray
    resolution: tuple[float, ...]

    @property
    def groups(self) -> int:
        return len(self.weights)

    @property
    def shape(self) -> Shape:
        """Of one group."""
        _, outputs, inputs, *kernel = self.weights.shape
        return Shape(outputs, inputs, tuple(kernel))

    def seeing(self, inputs: Inputs) -> Problem:
        """With the weights that come nearest to these on inputs that are no longer those the layer was made for."""
        if inputs.regression is None:
            return self
        rows = self.weights.reshape(self.groups, self.shape.outputs, -1) @ inputs.regression
        return replace(self, weights=rows.reshape(self.weights.shape))

    @property
    def macs(self) -> float:
        """For one position of the output, of one group."""
        return float(self.shape.outputs * self.shape.taps)


def problem_of(layer: Layer, shapes: Shapes) -> Problem:
    """`shapes`: of the model's values by name; where they are not known, an input is taken for `stride` outputs."""
    node = layer.node
    stored = constant_of(node.inputs[layer.weight_index])
    assert stored is not None
    if node.op_type != "Conv":
        rows = np.moveaxis(stored, layer.channel_axis, 0).astype(np.float64)
        alpha = float(attribute(node, "alpha", 1.0)) if node.op_type == "Gemm" else 1.0
        return Problem(layer, alpha * rows[None], ())
    groups = attribute(node, "group", 1)
    weights = stored.reshape(groups, stored.shape[0] // groups, *stored.shape[1:]).astype(np.float64)
    rank = stored.ndim - 2
    strides = attribute(node, "strides", (1,) * rank)
    sizes = [shapes.get(str(value.name), ()) for value in (layer.input, node.outputs[0])]
    resolution = []
    for axis, stride in enumerate(strides):
        before, after = (each[2 + axis] if len(each) == 2 + rank else None for each in sizes)
        resolution.append(before / after if before and after else float(stride))
    return Problem(layer, weights, tuple(resolution))
