"""What a writer of an operator is given, and a few expressions that several need."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt import graph as g
from graphopt.passes.fusion.pattern import Writer


class Unwritable(Exception):
    """Why a node is left as it is."""


class Unknown(Unwritable):
    """What is not known of a node's inputs; writing out what makes them may tell."""


@dataclass(frozen=True)
class Site:
    """A node and a writer in front of it."""

    node: ir.Node
    writer: Writer
    opset: int

    def input(self, index: int) -> ir.Value | None:
        return g.input_of(self.node, index)

    def needed(self, index: int) -> ir.Value:
        """Raises Unwritable where the input is left out."""
        found = self.input(index)
        if found is None:
            raise Unwritable(f"its input {index} is left out")
        return found

    def wants(self, index: int) -> bool:
        """Whether anybody reads an output."""
        outputs = self.node.outputs
        return index < len(outputs) and bool(outputs[index].uses() or outputs[index].is_graph_output())

    def rank(self, value: ir.Value) -> int:
        """Raises Unwritable where it is not known."""
        if value.shape is None:
            raise Unknown(f"the rank of {value.name!r} is not known")
        return len(value.shape)

    def call(self, op_type: str, *inputs: ir.Value | np.ndarray | float, **attributes) -> ir.Value:
        """A new node; numbers among the inputs are constants of the type of the first one that is a value."""
        like = next((v.dtype for v in inputs if isinstance(v, ir.Value) and v.dtype is not None), ir.DataType.FLOAT)
        values = [v if isinstance(v, ir.Value) else self.writer.constant("constant", _array(v, like)) for v in inputs]
        return self.writer.node(op_type, values, attributes)

    def cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        made = self.writer.node("Cast", [value], {"to": int(dtype)})
        made.type = ir.TensorType(dtype)
        return made

    def mean(self, value: ir.Value) -> ir.Value:
        """Over the last axis, which stays, of size 1."""
        if self.opset < 18:
            return self.call("ReduceMean", value, axes=[-1], keepdims=1)
        return self.call("ReduceMean", value, np.array([-1], np.int64), keepdims=1)

    def unsqueezed(self, value: ir.Value, axes: Sequence[int]) -> ir.Value:
        if self.opset < 13:
            return self.call("Unsqueeze", value, axes=list(axes))
        return self.call("Unsqueeze", value, np.array(axes, np.int64))

    def split(self, value: ir.Value, sizes: Sequence[int]) -> list[ir.Value]:
        """Along the last axis."""
        starts = np.cumsum([0, *sizes])
        last = np.array([-1], np.int64)
        return [
            self.call("Slice", value, np.array([start], np.int64), np.array([end], np.int64), last)
            for start, end in itertools.pairwise(starts)
        ]


Write = Callable[[Site], list[ir.Value | None]]
"""The node's outputs, None for those that nobody wants; raises Unwritable."""


def _array(number: np.ndarray | float, like: ir.DataType) -> np.ndarray:
    return number if isinstance(number, np.ndarray) else np.array(number, like.numpy())
