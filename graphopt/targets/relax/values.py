"""What the importer knows of each ONNX value: a constant, a plain Relax tensor, a blocked one, or several of these."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from graphopt.targets.relax import computes

ELEMENTWISE, INJECTIVE, FUSABLE_ROOT, OPAQUE = 0, 2, 4, 8
"""TVM's operator patterns, as `FuseOps` reads them from the attribute `op_pattern`."""


@dataclass
class Value:
    """One ONNX value; at least one of `const`, `plain`, `blocked` is there."""

    shape: tuple[int, ...] | None
    """Static shape in ONNX's layout; None when it depends on data."""
    dtype: str
    const: np.ndarray | None = None
    plain: Any = None
    """A Relax expression in ONNX's layout."""
    blocked: Any = None
    """A Relax expression (N, C / block, H * W, block), for values of shape (N, C, H, W)."""
    block: int = 0

    @property
    def is_image(self) -> bool:
        return self.shape is not None and len(self.shape) == 4

    @property
    def channels(self) -> int:
        assert self.shape is not None
        return self.shape[1]

    @property
    def has_filler(self) -> bool:
        """True when the blocked form has padded channels."""
        return self.block > 0 and self.channels % self.block != 0


class Builder:
    """Emits Relax bindings and converts values between their forms, each at most once."""

    def __init__(self, block_builder, lanes: int):
        self.bb = block_builder
        self.lanes = lanes

    def block_for(self, channels: int) -> int:
        """The channel block of a value: one vector register, or a narrower one for a few channels."""
        block = self.lanes
        while block > 4 and channels <= block // 2:
            block //= 2
        return block

    def emit(self, expression) -> Any:
        return self.bb.emit(expression)

    def call(self, function: Callable, *arguments, pattern: int | None = None, name: str = "", **options):
        """Emit a call of a tensor expression; its arguments are Relax expressions."""
        if pattern is not None:
            options["primfunc_attrs"] = {"op_pattern": pattern}
        hint = name or function.__name__
        return self.emit(self.bb.call_te(function, *arguments, primfunc_name_hint=hint, **options))

    def reshape(self, expression, shape: tuple[int, ...]) -> Any:
        """The same elements in the same order; no data moves."""
        from tvm import relax

        new_shape: Any = shape
        return self.emit(relax.op.reshape(expression, new_shape))

    def constant(self, array: np.ndarray):
        from tvm import relax

        array = np.asarray(array, order="C")  # ascontiguousarray would make a scalar a vector
        return relax.const(array, str(array.dtype))

    def plain(self, value: Value):
        """The value in ONNX's layout."""

        if value.plain is None and value.const is not None:
            value.plain = self.constant(value.const)
        if value.plain is None:
            assert value.shape is not None and value.blocked is not None
            _batch, channels, height, width = value.shape
            if height * width == 1 and not value.has_filler:
                value.plain = self.reshape(value.blocked, value.shape)
            else:
                value.plain = self.call(
                    computes.unblock_channels,
                    value.blocked,
                    channels=channels,
                    size=(height, width),
                    pattern=INJECTIVE,
                )
        return value.plain

    def blocked(self, value: Value) -> Any:
        """The value (N, C, H, W) in blocked form, or None when it has none."""

        if value.blocked is not None:
            return value.blocked
        if not value.is_image:
            return None
        assert value.shape is not None
        batch, channels, height, width = value.shape
        block = self.block_for(channels)
        if value.const is not None:
            value.blocked = self.constant(block_array(value.const, block))
        elif height * width == 1 and channels % block == 0:
            value.blocked = self.reshape(self.plain(value), (batch, channels // block, 1, block))
        else:
            value.blocked = self.call(computes.block_channels, self.plain(value), block=block, pattern=INJECTIVE)
        value.block = block
        return value.blocked

    def operand(self, value: Value, like: Value) -> Any:
        """`value` in a blocked form that broadcasts against blocked `like`, or None where there is none."""

        if value.blocked is not None and value.block == like.block and value.channels == like.channels:
            return value.blocked
        if value.shape is None or len(value.shape) > 4:
            return None
        shape = (1,) * (4 - len(value.shape)) + value.shape
        assert like.shape is not None
        batch, channels, height, width = shape
        if channels not in (1, like.channels) or batch not in (1, like.shape[0]):
            return None
        if (height, width) not in ((1, 1), like.shape[2:]):
            return None
        if channels == 1 and like.channels != 1:
            if value.const is not None:
                return self.constant(value.const.reshape(batch, 1, height * width, 1))
            return self.reshape(self.plain(value), (batch, 1, height * width, 1))
        if value.const is not None:
            return self.constant(block_array(value.const.reshape(shape), like.block))
        if len(value.shape) != 4 or self.block_for(channels) != like.block:
            return None
        return self.blocked(value)


def block_array(array: np.ndarray, block: int) -> np.ndarray:
    """(N, C, H, W) -> (N, ceil(C / block), H * W, block) with zeros for padded channels."""
    batch, channels, height, width = array.shape
    blocks = -(-channels // block)
    padded = np.zeros((batch, blocks * block, height * width), array.dtype)
    padded[:, :channels] = array.reshape(batch, channels, height * width)
    return np.ascontiguousarray(padded.reshape(batch, blocks, block, -1).transpose(0, 1, 3, 2))
