"""Operators that move elements or only rename their places: Reshape and its kin, Concat, Slice."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from graphopt.targets.relax import (
    computes,
    views,
)
from graphopt.targets.relax.emitters import Inputs, Node, emits, image
from graphopt.targets.relax.rows import Rows
from graphopt.targets.relax.values import (
    OPAQUE,
    Builder,
    Value,
)


def reshaped(builder: Builder, value: Value, shape: tuple[int, ...]) -> Value:
    """The same elements in another shape."""
    return Value(shape, value.dtype, plain=builder.reshape(builder.moved(value), shape))


@emits("Reshape", "Flatten", "Squeeze", "Unsqueeze")
def reshape(builder: Builder, node: Node, inputs: Inputs) -> list[Value] | None:
    data = inputs[0]
    if data is None or data.shape is None:
        return None
    shape = _new_shape(node, data.shape, inputs[1] if len(inputs) > 1 else None)
    if shape is None or int(np.prod(shape)) != int(np.prod(data.shape)):
        return None
    if shape == data.shape:
        return [data]
    counted = data.reshaped(shape) if isinstance(data, Rows) else None
    return [counted or views.reshaped(builder, data, shape) or reshaped(builder, data, shape)]


def _new_shape(node: Node, old: tuple[int, ...], operand: Value | None) -> tuple[int, ...] | None:
    if node.op_type == "Flatten":
        axis = int(node.get("axis", 1))
        axis += len(old) if axis < 0 else 0
        return int(np.prod(old[:axis])), int(np.prod(old[axis:]))
    key = "shape" if node.op_type == "Reshape" else "axes"
    given = node.get(key, None)
    if given is None and operand is not None and operand.const is not None:
        given = operand.const.reshape(-1).tolist()
    if node.op_type == "Reshape":
        if given is None:
            return None
        zero_stays = not node.get("allowzero", 0)
        wanted = [old[i] if d == 0 and zero_stays else int(d) for i, d in enumerate(given)]
        if wanted.count(-1) > 1:
            return None
        if -1 in wanted:
            known = int(np.prod([d for d in wanted if d != -1]))
            if known == 0:
                return None
            wanted[wanted.index(-1)] = int(np.prod(old)) // known
        return tuple(wanted)
    if node.op_type == "Squeeze":
        if operand is not None and operand.const is None:
            return None
        drop = {i for i, d in enumerate(old) if d == 1} if given is None else {int(a) % len(old) for a in given}
        return tuple(d for i, d in enumerate(old) if i not in drop)
    if given is None:
        return None
    rank = len(old) + len(given)
    places, rest = {int(a) % rank for a in given}, iter(old)
    return tuple(1 if i in places else next(rest) for i in range(rank))


FEWEST_LANES = 4
"""A concatenation whose parts end within a block moves at least so many channels at a time, else by TVM's own means."""


@emits("Split")
def split(builder: Builder, node: Node, inputs: Inputs) -> list[Value] | None:
    """With parts of no elements, which TVM has no tensors for; other splits are TVM's."""
    from tvm import relax

    data, operand = [*inputs, None][:2]
    sizes = node.get("split", None)
    if operand is not None and operand.const is not None:
        sizes = operand.const.reshape(-1).tolist()
    if data is None or data.shape is None or sizes is None or 0 not in sizes or 0 in data.shape:
        return None
    axis, start, found = int(node.get("axis", 0)) % len(data.shape), 0, []
    for size in map(int, sizes):
        shape = (*data.shape[:axis], size, *data.shape[axis + 1 :])
        if size == 0:
            found.append(Value(shape, data.dtype, const=np.zeros(shape, data.dtype)))
        elif size == data.shape[axis]:
            found.append(Value(shape, data.dtype, plain=builder.plain(data)))
        else:
            cut: Any = relax.op.strided_slice
            part = builder.emit(cut(builder.plain(data), [axis], [start], [start + size]))
            found.append(Value(shape, data.dtype, plain=part))
        start += size
    return found


@emits("Concat")
def concat(builder: Builder, node: Node, inputs: Inputs) -> list[Value] | None:
    from tvm import relax

    values = [v for v in inputs if v is not None and (v.shape is None or 0 not in v.shape)]
    axis = int(node.get("axis", 1))
    if values and len(values) < len(inputs) and all(v.shape is not None for v in values):
        return [values[0] if len(values) == 1 else _joined(builder, values, axis % len(values[0].shape or ()))]
    if not values or any(not v.is_image for v in values) or axis % 4 != 1 or len({v.dtype for v in values}) != 1:
        return None
    if not any(v.is_blocked for v in values):
        return None
    total = sum(v.channels for v in values)
    block = builder.block_for(total)
    channels = [v.channels for v in values]
    if math.gcd(block, *channels) < FEWEST_LANES:
        return None
    parts = [builder.blocked(v) for v in values]
    if any(v.channels % block or v.block != block for v in values):
        joined = builder.call(computes.concat_lanes, *parts, channels=channels, block=block, pattern=OPAQUE)
    else:
        joined = builder.emit(relax.op.concat(parts, axis=1))
    shape = values[0].shape
    assert shape is not None
    return image(builder, (shape[0], total, *shape[2:]), joined, values[0].dtype)


def _joined(builder: Builder, values: list[Value], axis: int) -> Value:
    """The values, in ONNX's layout, one after the other."""
    from tvm import relax

    whole = builder.emit(relax.op.concat([builder.plain(v) for v in values], axis=axis))
    return Value(tuple(int(n) for n in whole.ty.shape.values), values[0].dtype, plain=whole)


@emits("Slice")
def slice_(builder: Builder, node: Node, inputs: Inputs) -> list[Value] | None:
    """All bounds known now, so that their forms (attributes before opset 10, operands after) become one."""
    from tvm import relax

    data = inputs[0]
    if data is None or data.shape is None:
        return None
    if node.opset < 10:
        starts, ends, axes, steps = (node.get(key, None) for key in ("starts", "ends", "axes", "steps"))
    else:
        operands = [inputs[i] if len(inputs) > i else None for i in range(1, 5)]
        if any(v is not None and v.const is None for v in operands):
            return None
        starts, ends, axes, steps = (v if v is None else v.const.reshape(-1).tolist() for v in operands)  # type: ignore[union-attr]
    if starts is None or ends is None:
        return None
    rank = len(data.shape)
    axes = [int(a) % rank for a in (range(len(starts)) if axes is None else axes)]
    steps = [1] * len(axes) if steps is None else steps
    whole, begin, end, stride = list(data.shape), [], [], []
    for axis, start, stop, step in zip(axes, starts, ends, steps, strict=True):
        taken = range(*slice(int(start), int(stop), int(step)).indices(data.shape[axis]))
        if len(taken) == 0 or step < 0:
            return None
        begin.append(taken.start)
        end.append(taken[-1] + 1)
        stride.append(int(step))
        whole[axis] = len(taken)
    cut: Any = relax.op.strided_slice
    sliced = builder.emit(cut(builder.moved(data), axes, begin, end, stride))
    return [Value(tuple(whole), data.dtype, plain=sliced)]


@emits("Tile")
def tile(builder: Builder, node: Node, inputs: Inputs) -> list[Value] | None:
    """Copies of the whole along each axis, as axes of their own: TVM's remainders of indices came out wrong for some
    sizes."""
    data, repeats = inputs[0], inputs[1] if len(inputs) > 1 else None
    if node.opset < 6 or data is None or not data.shape or repeats is None or repeats.const is None:
        return None
    counts = [int(n) for n in repeats.const.reshape(-1)]
    if 0 in counts or 0 in data.shape:
        return None
    shape = tuple(n * d for n, d in zip(counts, data.shape, strict=True))
    if shape == data.shape:
        return [data]
    made = builder.call(_copies, builder.moved(data), counts=counts, pattern=OPAQUE, name="tile")
    return [Value(shape, data.dtype, plain=builder.reshape(made, shape))]


def _copies(data: Any, *, counts: list[int]) -> Any:
    """(n0, d0, n1, d1, ...), the n that are 1 left out."""
    from tvm import te

    sizes = [(n, d) for n, d in zip(counts, (int(d) for d in data.shape), strict=True)]
    places, whole = [], []
    for n, d in sizes:
        whole += [n, d] if n > 1 else [d]
        places.append(len(whole) - 1)
    return te.compute(whole, lambda *i: data[tuple(i[place] for place in places)], name="tile")
