"""What an emitter is, the table of them, and the geometry of sliding windows they share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from graphopt.targets.relax.values import Builder, Value

Inputs = Sequence[Value | None]
Emitter = Callable[[Builder, "Node", Inputs], "list[Value] | None"]


@dataclass(frozen=True)
class Node:
    """An ONNX node as emitters see it."""

    name: str
    op_type: str
    attributes: dict[str, Any]
    opset: int
    outputs: int

    def get(self, key: str, default):
        return self.attributes.get(key, default)


EMITTERS: dict[str, Emitter] = {}


def emits(*op_types: str):
    """Register an emitter."""

    def register(function: Emitter) -> Emitter:
        EMITTERS.update(dict.fromkeys(op_types, function))
        return function

    return register


def image(builder: Builder, shape, blocked, dtype: str = "float32") -> list[Value]:
    return [Value(tuple(shape), dtype, blocked=blocked, block=int(blocked.ty.shape[3]))]


def is_float_image(value: Value | None) -> bool:
    return value is not None and value.is_image and value.dtype == "float32"


def pads_of(node: Node, size, kernel, strides, dilations) -> tuple[int, int, int, int]:
    mode = node.get("auto_pad", b"NOTSET")
    mode = mode.decode() if isinstance(mode, bytes) else mode
    if mode in ("NOTSET", ""):
        top, left, bottom, right = node.get("pads", (0, 0, 0, 0))
        return int(top), int(left), int(bottom), int(right)
    if mode == "VALID":
        return 0, 0, 0, 0
    before, after = [], []
    for extent, k, s, d in zip(size, kernel, strides, dilations, strict=True):
        total = max((-(-extent // s) - 1) * s + (k - 1) * d + 1 - extent, 0)
        small, large = total // 2, total - total // 2
        before.append(small if mode == "SAME_UPPER" else large)
        after.append(large if mode == "SAME_UPPER" else small)
    return before[0], before[1], after[0], after[1]


def output_size(size, kernel, strides, dilations, pads, ceil: bool = False) -> tuple[int, int]:
    found = []
    for axis in range(2):
        span = size[axis] + pads[axis] + pads[axis + 2] - (kernel[axis] - 1) * dilations[axis] - 1
        steps = -(-span // strides[axis]) if ceil else span // strides[axis]
        if ceil and steps * strides[axis] >= size[axis] + pads[axis]:
            steps -= 1  # a window that starts in the far padding is not counted
        found.append(steps + 1)
    return found[0], found[1]
