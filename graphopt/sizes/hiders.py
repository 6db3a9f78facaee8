"""What may make real elements so negative that Softmax gives them nothing.

A masked tail counts for nothing beside real elements, unless all real elements of a row are masked as well: then what
is behind them counts as much as they do. So it is followed which masks reach a value: inputs of the model, and values
that depend on sizes alone, whose contents are known.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from graphopt import graph as graphs
from graphopt.sizes.tails import LOW

Fixed = tuple[str, bool]
"""A value that depends on sizes alone, and whether it is true, where it is boolean, for what is hidden."""
_MOVING = frozenset({
    "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Expand", "Tile", "Slice", "Split", "Concat", "Pad",
})  # fmt: skip
_ELEMENTWISE = frozenset({
    "Add", "Sub", "Mul", "Div", "Neg", "Min", "Max", "Clip", "Where", "Not", "And", "Or", "Xor", "Equal", "Less",
    "LessOrEqual", "Greater", "GreaterOrEqual", "Cast", "Identity", "Sum", "Mean", "Dropout", "Abs", "Pow", "Log",
    "Exp", "Relu", "LeakyRelu", "PRelu", "QuantizeLinear", "DequantizeLinear", "Reciprocal", "Sign", "IsNaN", "IsInf",
})  # fmt: skip
"""Others make ordinary numbers of whatever they are given, or sum over many."""


@dataclass
class Hiders:
    """By value: the inputs, and the values that depend on sizes alone, that may hide elements of it."""

    found: dict[str, tuple[frozenset[str], frozenset[Fixed]]] = field(default_factory=dict)
    arrays: dict[str, Collection[np.ndarray]] = field(default_factory=dict)
    """Of values that depend on sizes alone, what they are for each size."""

    def of(self, value: ir.Value | None) -> tuple[frozenset[str], frozenset[Fixed]]:
        return self.found.get("" if value is None else str(value.name), (frozenset(), frozenset()))

    def add_input(self, name: str) -> None:
        self.found[name] = frozenset({name}), frozenset()

    def add_fixed(self, name: str, by_size: Mapping[int, np.ndarray]) -> None:
        """A value that depends on sizes alone: it hides something where some of it is false, or a mask's number."""
        arrays = list(by_size.values())
        self.arrays[name] = arrays
        boolean = arrays[0].dtype == np.bool_
        if boolean or any(_hides(array) for array in arrays):
            self.found[name] = frozenset(), frozenset({(name, False)})

    def follow(self, node: ir.Node) -> None:
        """Note what may hide elements of a node's outputs."""
        if node.op_type not in _ELEMENTWISE | _MOVING:
            return
        inputs = [self.of(v) for v in node.inputs]
        told = frozenset[str]().union(*(each[0] for each in inputs))
        fixed = frozenset[Fixed]().union(*(each[1] for each in inputs))
        if node.op_type == "Not" or (node.op_type == "Where" and _is_low(node.inputs[1])):
            fixed = frozenset((name, not inverted) for name, inverted in fixed)
        for value in node.outputs:
            self.found[str(value.name)] = told, fixed

    def shows_something(self, fixed: Fixed) -> bool:
        """Whether something of each row stays, for every size; rows are along the last axis."""
        return all(bool(shown.any(axis=-1).all()) for shown in self._shown(fixed))

    def shows_first(self, fixed: Fixed) -> bool:
        """Whether the first element of each row stays, for every size."""
        return all(bool(shown[..., 0].all()) for shown in self._shown(fixed))

    def _shown(self, fixed: Fixed) -> list[np.ndarray]:
        name, inverted = fixed
        found = [array if array.dtype == np.bool_ else array > LOW for array in self.arrays[name]]
        return [np.atleast_1d(~shown if inverted else shown) for shown in found]


def _hides(array: np.ndarray) -> bool:
    return array.dtype.kind == "f" and bool((array <= LOW).any())


def _is_low(value: ir.Value | None) -> bool:
    constant = graphs.constant_of(value)
    return constant is not None and _hides(constant)
