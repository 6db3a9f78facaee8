"""Values that only rearrange another one: transposed, sliced, reshaped. Nothing moves until somebody needs a layout.

A `Strided` value knows where each element lies in its base: an offset and a stride for each axis, as numpy's arrays do.
Products of activations read through the strides; anybody else who asks for `plain` gets a copy, made once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from graphopt.targets.relax.emitters import Inputs, Node, emits
from graphopt.targets.relax.rows import Rows
from graphopt.targets.relax.values import INJECTIVE, Builder, Deferred, Value, element_type


class Base:
    """A Relax tensor that values are views of."""

    def __init__(self, builder: Builder, tensor: Any, shape: tuple[int, ...]):
        self._builder, self.tensor, self.shape = builder, tensor, shape
        self._flat: Any = None

    @property
    def flat(self) -> Any:
        """The tensor with one axis."""
        if self._flat is None:
            self._flat = self.shaped((int(np.prod(self.shape)),))
        return self._flat

    def shaped(self, shape: tuple[int, ...]) -> Any:
        """The tensor in another shape, reshaped once: a chain of reshapes would be compiled to a copy."""
        return self.tensor if shape == self.shape else self._builder.reshape(self.tensor, shape)


class Strided(Deferred):
    """A float32 value whose elements are those of `base` times `factor`."""

    def __init__(self, builder: Builder, base: Base, places: np.ndarray, offset: int = 0, factor: float = 1.0):
        self._builder, self.base, self.offset, self.factor = builder, base, offset, factor
        self.places = places
        """Never read: its shape and strides (in elements) are this value's."""
        super().__init__(tuple(places.shape), "float32")

    @property
    def _in_order(self) -> bool:
        whole = self.offset == 0 and self.places.size == int(np.prod(self.base.shape))
        return whole and self.factor == 1.0 and bool(self.places.flags.c_contiguous)

    def _made(self) -> Any:
        shape = tuple(self.places.shape)
        if self._in_order:
            return self.base.shaped(shape)
        return self._builder.call(
            copied,
            self.base.flat,
            shape=shape,
            strides=self.places.strides,
            offset=self.offset,
            factor=self.factor,
            pattern=INJECTIVE,
            name="transpose",
        )

    def with_places(self, places: np.ndarray, offset: int = 0) -> Strided:
        """Another view of the same base, its first element `offset` further on."""
        return Strided(self._builder, self.base, places, self.offset + offset, self.factor)

    def scaled(self, factor: float) -> Strided:
        """The value times a number."""
        return Strided(self._builder, self.base, self.places, self.offset, self.factor * factor)


def copied(base, *, shape, strides, offset: int, factor: float):
    """The elements of a flat tensor at `offset` + indices * strides."""
    from tvm import te

    return te.compute(shape, lambda *i: element(base, i, strides, offset, factor), name="transpose")


def element(base, indices: Sequence[Any], strides: Sequence[int], offset: int, factor: float):
    """One element of a strided value."""
    from tvm import tirx

    place: Any = offset
    for index, stride in zip(indices, strides, strict=True):
        if stride:
            place = place + index * stride
    value = base[place]
    return value if factor == 1.0 else value * tirx.const(float(np.float32(factor)), "float32")


def strided(builder: Builder, value: Value) -> Strided | None:
    """A value as a strided one; None for constants, other types, blocked images and what is stored as bfloat16."""
    if isinstance(value, Strided):
        return value
    if value.dtype != "float32" or value.const is not None or value.plain is None or not value.shape:
        return None
    if 0 in value.shape or element_type(value.plain) != "float32":
        return None
    return Strided(builder, Base(builder, value.plain, value.shape), _dummy(value.shape))


def _dummy(shape: Sequence[int]) -> np.ndarray:
    strides = [int(np.prod(shape[i + 1 :], dtype=np.int64)) for i in range(len(shape))]
    return as_strided(np.zeros(1, np.int8), tuple(shape), strides)


def reshaped(builder: Builder, value: Value, shape: tuple[int, ...]) -> Strided | None:
    """A value in another shape as a strided one, or None where its elements would have to move."""
    found = None if value.blocked is not None or 0 in shape else strided(builder, value)
    if found is None:
        return None
    places = found.places.view()
    try:
        places.shape = shape
    except AttributeError:
        return None
    return found.with_places(places)


@emits("Transpose")
def transpose(builder: Builder, node: Node, inputs: Inputs) -> list[Value] | None:
    data = inputs[0]
    if data is None or not data.shape:
        return None
    perm = tuple(int(p) for p in node.get("perm", tuple(range(len(data.shape)))[::-1]))
    picture = data.picture(perm) if isinstance(data, Rows) else None
    if picture is not None:
        return [picture]
    found = strided(builder, data)
    if found is None:
        return None
    return [found.with_places(found.places.transpose(perm))]


@emits("Gather")
def gather(builder: Builder, node: Node, inputs: Inputs) -> list[Value] | None:
    """One constant position along an axis of a strided value."""
    data, index = inputs[0], inputs[1]
    if not isinstance(data, Strided) or index is None or index.const is None or index.const.ndim != 0:
        return None
    assert data.shape is not None
    axis = int(node.get("axis", 0)) % len(data.shape)
    position = int(index.const) % data.shape[axis]
    shape = [d for i, d in enumerate(data.shape) if i != axis]
    strides = [s for i, s in enumerate(data.places.strides) if i != axis]
    places = as_strided(np.zeros(1, np.int8), shape, strides)
    return [data.with_places(places, position * data.places.strides[axis])]
