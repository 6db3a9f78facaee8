"""Rows: what a product of many rows gives, kept in the blocked form in which convolutions give pictures.

The rows (..., N) are the positions of a picture (1, N, 1, M), M of them. Elementwise operators between two products run
on that picture, in the registers of the first product's kernel; the second one reads its blocks. Whoever knows of no
rows asks for `plain` and gets a copy in ONNX's layout, made once.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from graphopt.targets.relax import integer_computes
from graphopt.targets.relax.emitters import Emitter, Inputs, Node
from graphopt.targets.relax.values import INJECTIVE, Builder, Deferred, Encoded, Value

ELEMENTWISE_OPERATORS = frozenset(
    ["Relu", "Clip", "LeakyRelu", "HardSigmoid", "HardSwish", "Sigmoid", "Tanh", "Exp", "Erf", "Gelu", "Identity",
     "Dropout", "Add", "Sub", "Mul", "Div", "Max", "Min", "Sum", "QuantizeLinear", "DequantizeLinear"]
)  # fmt: skip
TO_PICTURE = (0, 3, 1, 2)
"""The transposition from (N, H, W, C) to ONNX's pictures (N, C, H, W)."""


class Rows(Deferred):
    """A value (..., N) whose forms are those of `image`, a picture (1, N, 1, M)."""

    def __init__(self, builder: Builder, image: Value, shape: tuple[int, ...]):
        self._builder, self.image = builder, image
        known = image.encoded
        encoded = None
        if known is not None:
            encoded = Encoded(Rows(builder, known.source, shape), known.scale, known.zero_point)
        super().__init__(shape, image.dtype, encoded=encoded, fuses=image.fuses, readers=image.readers)

    def _made(self) -> Any:
        if self.encoded is not None:
            return self._builder.decoded(self.encoded, self._builder.moved(self.encoded.source))
        stored = self._builder.blocked(self.image)
        return self._builder.call(integer_computes.unblock_rows, stored, shape=self.shape, pattern=INJECTIVE)

    @property
    def fuses(self) -> bool:  # type: ignore[override]
        return self.image.fuses

    @fuses.setter
    def fuses(self, value: bool) -> None:
        self.image.fuses = value

    @property
    def readers(self) -> int:  # type: ignore[override]
        return self.image.readers

    @readers.setter
    def readers(self, value: int) -> None:
        self.image.readers = value

    @property
    def in_blocks(self) -> bool:
        """False when somebody has asked for ONNX's layout: then that is there, and blocks may not be."""
        return self.waits

    def reshaped(self, shape: tuple[int, ...]) -> Rows | None:
        """The same rows counted otherwise; None where rows themselves would change."""
        assert self.shape is not None
        if not shape or shape[-1] != self.shape[-1] or not self.in_blocks:
            return None
        return Rows(self._builder, self.image, shape)

    def picture(self, perm: tuple[int, ...]) -> Value | None:
        """The transposed value, where it is the picture that the blocks already are; else None."""
        assert self.shape is not None
        if perm != TO_PICTURE or len(self.shape) != 4 or self.shape[0] != 1 or not self.in_blocks:
            return None
        shape = (1, self.shape[3], self.shape[1], self.shape[2])
        found = replace(self.image, shape=shape)
        if found.encoded is not None:
            found.encoded = replace(found.encoded, source=replace(found.encoded.source, shape=shape))
        found.levels = found.made_of = None  # functions of bytes of the other shape
        return found


def emitted(emitter: Emitter, builder: Builder, node: Node, inputs: Inputs) -> list[Value] | None:
    """What an elementwise operator makes of rows, as rows; None where not all operands have that form."""
    first = next((v for v in inputs if isinstance(v, Rows)), None)
    if first is None or node.op_type not in ELEMENTWISE_OPERATORS or not first.in_blocks:
        return None
    images: list[Value | None] = []
    for value in inputs:
        found = None if value is None else _image(value, first)
        if value is not None and found is None:
            return None
        images.append(found)
    results = emitter(builder, node, images)
    if results is None or any(each.shape != first.image.shape for each in results):
        return None
    assert first.shape is not None
    return [Rows(builder, each, first.shape) for each in results]


def _image(value: Value, like: Rows) -> Value | None:
    """An operand as it meets the picture of `like`."""
    if isinstance(value, Rows):
        return value.image if value.shape == like.shape and value.in_blocks else None
    if value.const is None or value.shape is None or like.shape is None:
        return None
    if value.const.size == 1:
        return value
    if value.shape[-1] == like.shape[-1] == value.const.size:
        return Value((1, value.const.size, 1, 1), value.dtype, const=value.const.reshape(1, -1, 1, 1))
    return None


def rows_of(builder: Builder, done: Value, shape: tuple[int, ...]) -> Value:
    """A blocked picture (1, N, 1, M) as the rows (..., N) of ONNX's layout."""
    assert done.shape is not None
    if math.prod(shape[:-1]) == 1:  # one row's blocks are the row
        builder.blocked(done)
        return Value(shape, done.dtype, plain=builder.reshape(builder.moved(done), shape))
    return Rows(builder, done, shape)
